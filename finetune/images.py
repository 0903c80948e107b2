"""One picture, from a file or from bytes, as pixels: decoded, made upright, resized, in the channels asked for.

Whatever the picture is (transparent, grey, palette, CMYK, 16-bit, turned by its EXIF tag, animated), what comes out is
uint8. What cannot be used raises `BadImageError`, which says why in plain words.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from finetune.errors import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # what a network of so many channels is fed
# Plugins that only decode: EPS, for one, would start Ghostscript on a stranger's program.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX")
FORMATS += ("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
TURN = Image.Transpose
TURNS = (TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM)
TURNS += (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
UPRIGHT = dict(enumerate(TURNS, start=2))  # what undoes EXIF orientations 2 to 8 (tag 0x0112)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # a bad picture is reported by BadImageError, not by the way


class BadImageError(Exception):
    """A picture that cannot be used; the text says why, in words that follow its name."""


def check_format(channels: int, background: str) -> None:
    """Raises UserError if no picture could be decoded to this: channels other than 1, 3, 4, or not a colour."""
    if channels not in MODES:
        raise UserError(f"model: found a network of {channels} input channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    try:
        ImageColor.getcolor(background, "RGB")
    except ValueError:
        raise UserError(
            f"data.background: found {background!r}; expected a colour such as white, '#ff8000' or 'rgb(255, 128, 0)'"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of PIL's: of large pictures that it still allows, of odd metadata. Not to be entered by threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def decode(source: bytes | str, channels: int, resolution: int, crop: str, background: str) -> np.ndarray:
    """The picture as uint8 (H, W, channels), its shorter side resized to `resolution` with antialiasing.

    Args:
        source: an encoded picture, or the path of one.
        channels: 1 (grey, ITU-R 601 luma), 3 (RGB) or 4 (RGBA: the only one that stays transparent).
        crop: `center` cuts the middle square, H = W = resolution; `random` keeps the longer side for a later choice.
        background: the colour that transparent pixels are laid on.

    Raises:
        BadImageError: truncated, empty, no picture, fewer than 2 pixels a side, too large, or unreadable.
    """
    try:
        return _decode(source, channels, resolution, crop, background)
    except BadImageError:
        raise
    except Exception as error:  # a damaged file may raise anything from any of the decoders
        raise BadImageError(_reason(error, source)) from None


def _decode(source: bytes | str, channels: int, resolution: int, crop: str, background: str) -> np.ndarray:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        width, height = image.size
        if min(width, height) < 2:
            raise BadImageError(f"is {width} x {height} pixels, expected at least 2 a side")
        # JPEG decodes at 1/2, 1/4 or 1/8, never below what is asked. Its sides are then no whole numbers of pixels.
        reduced = image.draft("RGB", (resolution, resolution))
        image.load()
        orientation = _orientation(image)  # after load: TIFF turns itself upright there
        image = _resized(_plain(image), reduced[1][2:] if reduced else image.size, resolution, crop)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    if image.mode == "RGBA" and channels != 4:
        canvas = Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGB"))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _plain(image: Image.Image) -> Image.Image:
    """The same picture in L, RGB or RGBA: the modes that can be resized without loss of meaning."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """More than 8 bits a pixel, scaled down so that the brightest value of the format becomes 255.

    Integers reach 65,535, or 2^31 - 1 where they do not fit; floats the smallest of 1, 255 and 65,535 that holds them.
    """
    values = np.asarray(image, dtype=np.float32)
    peaks = (1, 255, 65535) if image.mode == "F" else (65535, 2**31 - 1)
    peak = next((peak for peak in peaks if values.max() <= peak), None)
    if peak is None or not values.min() >= 0:  # not: a NaN is bad too
        raise BadImageError(f"has values from {values.min():g} to {values.max():g}, expected 0 to {peaks[-1]}")
    grey = Image.fromarray((values * (255 / peak) + 0.5).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def _resized(image: Image.Image, sides: tuple[float, float], resolution: int, crop: str) -> Image.Image:
    """Shorter side = resolution. A gap of 3 reduces large pictures by whole pixels first: faster, same to the eye."""
    (width, height), side = sides, min(sides)
    if crop == "center":
        left, top = (width - side) / 2, (height - side) / 2
        size, box = (resolution, resolution), (left, top, left + side, top + side)
    else:
        size, box = tuple(max(resolution, round(length * resolution / side)) for length in sides), (0, 0, *sides)
        if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise BadImageError(
                f"is {width:g} x {height:g} pixels: too long and narrow to become {size[0]} x {size[1]}"
            )
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _reason(error: Exception, source: bytes | str) -> str:
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        empty = len(source) == 0 if isinstance(source, bytes) else os.path.getsize(source) == 0
        return "is empty (0 bytes)" if empty else "is not a picture in any known format, or damaged at its start"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {detail}"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return f"is damaged or cut off: {detail}"
