"""One picture, from a file or from bytes, as pixels: decoded, upright, in sRGB, resized, in the channels asked for.

Whatever the picture is (transparent, grey, palette, CMYK, 16-bit, with a colour profile, rotated by its EXIF tag,
animated), the result is uint8 and looks as a viewer shows it. A picture that cannot be used raises BadImageError.
"""

import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from finetune.core.errors import UserError
from finetune.core.shapes import Shape, covering, nearest
from finetune.data.colour import in_srgb
from finetune.data.colour_tags import profile_of
from finetune.data.formats import FORMATS, HEAD, unread_format
from finetune.data.pixels import BadImageError, Original
from finetune.data.samples import check_channels, eight_bits

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the network's channels
GREY_MODES = ("1", "L", "LA", "La")
ORIENTATION = 274  # in EXIF and TIFF
DRAFTED = ("JPEG", "MPO")  # formats that may be decoded smaller, and whose EXIF tag is known before that
# A PNG may hold metadata of any size; PIL's own limit of 1 MB for a chunk refuses good pictures. This one is for all.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
logging.getLogger("PIL").addHandler(logging.NullHandler())  # silence PIL's logger: BadImageError reports bad pictures


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
        profile = profile_of(file, source)
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
    if image.mode.startswith(("I", "F")):
        return eight_bits(image)
    check_channels(image)
    if image.mode == "CMYK" and keep_cmyk:
        return image
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


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
        known = unread_format(_head(source)) or "is not a picture in any known format, or damaged at its start"
        return "is empty (0 bytes)" if empty else known
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {detail}"
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    return f"is damaged or cut off: {detail}"


def _head(source: bytes | str) -> bytes:
    if isinstance(source, bytes):
        return source[:HEAD]
    with open(source, "rb") as file:
        return file.read(HEAD)
