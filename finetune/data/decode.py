"""One picture, from a file or from bytes, as pixels: decoded, upright, in sRGB, resized, in the channels asked for.

Whatever the picture is (transparent, grey, palette, CMYK, 16-bit, with a colour profile, rotated by its EXIF tag,
animated), the result is uint8 and looks as a viewer shows it. A picture that cannot be used raises BadImageError.
"""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from finetune.core.errors import UserError
from finetune.core.shapes import Shape, covering, nearest
from finetune.data.colour import in_srgb
from finetune.data.pixels import Original

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the network's channels
# Plugins that only decode: EPS, for one, would start Ghostscript on an untrusted program.
FORMATS: tuple[str, ...] = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX")
FORMATS += ("PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
GREY_MODES = ("1", "L", "LA", "La")
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, INK_SET, SAMPLE_FORMAT = 258, 262, 281, 332, 339  # TIFF's tags
ORIENTATION = 274  # in EXIF and TIFF
DRAFTED = ("JPEG", "MPO")  # formats that may be decoded smaller, and whose EXIF tag is known before that
WHITE_IS_ZERO, OTHER_INKS, SIGNED = 0, 2, 2  # values of three of them
# A PNG may hold metadata of any size; PIL's own limit of 1 MB for a chunk refuses good pictures. This one is for all.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
logging.getLogger("PIL").addHandler(logging.NullHandler())  # silence PIL's logger: BadImageError reports bad pictures


class BadImageError(Exception):
    """A picture that cannot be used; the message says why, and follows the picture's name."""


def check_format(channels: int, background: str) -> None:
    """Raises UserError unless pictures can become this: 1, 3 or 4 channels, and a background that is a colour."""
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
    """Ignore PIL's warnings: large pictures that it still allows, odd metadata. Not thread-safe: enter it outside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def original(source: bytes | str) -> Original:
    """Size, once it is upright, and colour of a picture that `decode` accepts, by its header."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
        size = file.size[::-1] if _lies_on_its_side(file) else file.size
        return Original(*size, colour=file.mode not in GREY_MODES and not file.mode.startswith(("I", "F")))


class Decoded(NamedTuple):
    """A picture as pixels."""

    pixels: npt.NDArray[np.uint8]  # (H, W, C)
    shape: Shape  # what is trained of it: all, or less where crops are random
    width: int  # before it was resized, upright
    height: int


def decode(source: bytes | str, channels: int, resolution: int, crop: str, background: str) -> npt.NDArray[np.uint8]:
    """The picture as uint8 (H, W, channels), its shorter side resized to `resolution` with antialiasing.

    The arguments are those of `decode_to_shape`, for a square.
    """
    return decode_to_shape(source, channels, [Shape(resolution, resolution)], crop, background).pixels


def decode_to_shape(source: bytes | str, channels: int, shapes: Sequence[Shape], crop: str, background: str) -> Decoded:
    """The picture, resized with antialiasing to cover the shape that is nearest to its own.

    Args:
        source: an encoded picture, or the path of one.
        channels: 1 (grey, ITU-R 601 luma), 3 (RGB) or 4 (RGBA: the only one that stays transparent).
        crop: `center` cuts the middle part, of exactly the shape; `random` keeps what is longer for a later choice.
        background: the colour that transparent pixels are laid on.

    Raises:
        BadImageError: truncated, empty, no picture, fewer than 2 pixels a side, too large, or unreadable.
    """
    try:
        return _decode(source, channels, shapes, crop, background)
    except BadImageError:
        raise
    except Exception as error:  # a damaged file may raise anything from any of the decoders
        raise BadImageError(_reason(error, source)) from None


def _decode(source: bytes | str, channels: int, shapes: Sequence[Shape], crop: str, background: str) -> Decoded:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
        width, height = file.size
        if min(width, height) < 2:
            raise BadImageError(f"is {width} x {height} pixels, expected at least 2 a side")
        transparency = _transparency(file)
        if file.format not in DRAFTED:
            file.load()  # now a TIFF is upright, and a PNG's EXIF tag known
        upright = file.size[::-1] if _lies_on_its_side(file) else file.size
        shape = nearest(shapes, *upright)
        target = shape if upright == file.size else Shape(shape.width, shape.height)  # as the file lies
        # JPEG decodes at 1/2, 1/4 or 1/8, never below what is asked. The original size divided by the scale may be
        # fractional.
        reduced = file.draft("RGB", (target.width, target.height))
        file.load()
        if transparency is not None:
            file.info["transparency"] = transparency
        sides = reduced[1][2:] if reduced else file.size
        profile = file.info.get("icc_profile")
        image = _resized(_resizable(file, keep_cmyk=bool(profile)), sides, target, crop)
    image = _upright(in_srgb(image, profile))
    if image.width < shape.width or image.height < shape.height:
        raise BadImageError("has an EXIF orientation that cannot be read reliably")
    if image.mode == "RGBA" and channels != 4:
        canvas = Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGB"))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    pixels = np.asarray(image.convert(MODES[channels]))
    return Decoded(pixels.reshape(*pixels.shape[:2], channels), shape, *upright)


def _transparency(file: Image.Image) -> Any:
    """A PNG's transparent colour in 8 bits, before it is loaded; PIL scales its samples, and leaves this as it is."""
    colour, tiles = file.info.get("transparency"), getattr(file, "tile", None)
    depth = str(tiles[0][3]) if file.format == "PNG" and tiles else ""
    if isinstance(colour, int) and depth in ("L;2", "L;4"):
        return colour * (85 if depth == "L;2" else 17)
    if isinstance(colour, tuple) and depth == "RGB;16B":
        return tuple(sample >> 8 for sample in colour)
    return colour


def _lies_on_its_side(file: Image.Image) -> bool:
    """Whether the EXIF orientation swaps width and height; PIL has swapped those of a TIFF file already."""
    try:
        return file.format != "TIFF" and file.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # broken metadata says nothing about the pixels
        return False


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says; TIFF pictures are upright since they were loaded."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata says nothing about the pixels
        return image


def _resizable(image: Image.Image, keep_cmyk: bool) -> Image.Image:
    """The same picture in L, RGB, RGBA, or CMYK if asked: the modes that can be resized without loss of meaning."""
    tags = _tags(image)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if tags and image.mode == "L" and _first(tags, SAMPLE_FORMAT, 1) == SIGNED:
        raise BadImageError("has signed samples of 8 bits, which PIL reads as unsigned")
    if tags and image.mode == "CMYK" and _first(tags, INK_SET, 1) == OTHER_INKS:
        raise BadImageError("has inks other than cyan, magenta, yellow and black")
    if image.format == "TIFF" and _first(tags, BITS_PER_SAMPLE, 8) == 16:  # PIL keeps the upper byte of each sample
        most = _first(tags, MAX_SAMPLE, 65535)
        if most < 65535:
            raise BadImageError(f"has colours of 16 bits with values up to {most}, of which PIL reads the upper 8 only")
    if image.mode == "CMYK" and keep_cmyk:
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF file; none of a picture in another format."""
    return getattr(image, "tag_v2", {})


def _first(tags: Mapping[int, Any], tag: int, default: int) -> int:
    """The first value of a TIFF tag, which may have one for each channel."""
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Samples of more than 8 bits, scaled so that the brightest value of the format becomes 255."""
    values = np.asarray(image, dtype=np.float64)
    peaks = _peaks(image)
    peak = next((peak for peak in peaks if values.max() <= peak), None)
    if peak is None or not values.min() >= 0:  # not: a NaN is bad too
        raise BadImageError(f"has values from {values.min():g} to {values.max():g}, expected 0 to {peaks[-1]}")
    scaled = (values * (255 / peak) + 0.5).astype(np.uint8)
    if _first(_tags(image), PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    grey.info = image.info
    if "transparency" not in image.info:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def _peaks(image: Image.Image) -> tuple[int, ...]:
    """The values that may stand for white, of which the smallest that no sample exceeds does.

    A file that says how many bits or which values its samples have leaves no choice. 32-bit integers and floats come
    without a convention: `datasets` writes 8-bit values as 32-bit TIFFs, and floats are 0..1, 0..255 or 0..65535.
    """
    if image.mode == "F":
        return (1, 255, 65535)
    if image.format != "TIFF":
        return (65535,)  # PNG, PGM and JPEG 2000 are scaled to 16 bits by PIL
    tags = _tags(image)
    bits = _first(tags, BITS_PER_SAMPLE, 16)
    most = _first(tags, MAX_SAMPLE, 0)
    if most > 0 and (most + 1).bit_count() == 1:  # 2^k - 1 is a depth; any other value only a statistic of this picture
        return (most,)
    if bits < 32:
        return (2 ** (bits - (_first(tags, SAMPLE_FORMAT, 1) == SIGNED)) - 1,)
    return (255, 65535, 2**31 - 1)


def _resized(image: Image.Image, sides: tuple[float, float], shape: Shape, crop: str) -> Image.Image:
    """Just as large as covers the shape. A gap of 3 reduces large pictures by whole pixels first: faster, no visible
    loss."""
    width, height = sides
    if crop == "center":
        across, down = shape.width, shape.height
        inside = min(width, height * across / down), min(height, width * down / across)
        left, top = (width - inside[0]) / 2, (height - inside[1]) / 2
        box = (left, top, left + inside[0], top + inside[1])
    else:
        across, down = covering(width, height, shape)
        box = (0, 0, width, height)
        if across * down > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise BadImageError(f"is {width:g} x {height:g} pixels: too long and narrow to become {across} x {down}")
    return image.resize((across, down), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


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
