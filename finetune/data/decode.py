"""One picture, from a file or from bytes, as pixels: decoded, upright, in sRGB, resized, in the channels asked for.

Whatever the picture is (transparent, grey, palette, CMYK, 16-bit, with a colour profile, rotated by its EXIF tag,
animated), the result is uint8 and looks as a viewer shows it. A picture that cannot be used raises BadImageError.
"""

import io
import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps, ImageSequence, PngImagePlugin

from finetune.core.errors import UserError
from finetune.core.shapes import Shape, covering, nearest
from finetune.data.colour import in_srgb
from finetune.data.colour_tags import profile_of
from finetune.data.formats import FORMATS, ends_in_zeros, head_of, why_unreadable
from finetune.data.pixels import BadImageError, Original
from finetune.data.samples import (
    Depth,
    check_channels,
    depth_of,
    eight_bits,
    has_unused_alpha,
    is_reduced,
    to_full_page,
)

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
        opaque = len(ImageColor.getrgb(background)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise UserError(
            f"data.background: found {background!r}; expected a colour such as white, '#ff8000' or 'rgb(255, 128, 0)'"
        )


class Decoded(NamedTuple):
    """A picture as pixels."""

    pixels: npt.NDArray[np.uint8]  # (H, W, C)
    shape: Shape  # what is trained of it: all, or less where crops are random
    original: Original  # before it was resized, upright


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
        raise BadImageError(why_unreadable(error, source)) from None


def _decode(source: bytes | str, channels: int, shapes: Sequence[Shape], crop: str, background: str) -> Decoded:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file:
        several = _has_several(file)
        to_full_page(file)
        width, height = file.size
        if file.format in DRAFTED and ends_in_zeros(source):  # libjpeg would fill the rest with grey, in silence
            raise BadImageError("is damaged or cut off: it ends in zeros")
        if min(width, height) < 2:
            raise BadImageError(f"is {width} x {height} pixels, expected at least 2 a side")
        transparency, depth, colour = _transparency(file), depth_of(file, source), not _is_grey(file)
        profile = profile_of(file, source)  # a TIFF's EXIF is out of reach once it is loaded
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
        opaque = file.format == "TGA" and has_unused_alpha(head_of(source))
        resizable = _resizable(file.convert("RGB") if opaque else file, depth, keep_cmyk=bool(profile))
        image = _resized(resizable, sides, target, crop)
    image = _upright(in_srgb(image, profile))
    if image.width < shape.width or image.height < shape.height:
        raise BadImageError("has an EXIF orientation that cannot be read reliably")
    if image.mode == "RGBA" and channels != 4:
        canvas = Image.new("RGBA", image.size, ImageColor.getcolor(background, "RGB"))
        image = Image.alpha_composite(canvas, image).convert("RGB")
    pixels = np.asarray(image.convert(MODES[channels]))
    original = Original(*upright, colour, several)
    return Decoded(pixels.reshape(*pixels.shape[:2], channels), shape, original)


def _transparency(file: Image.Image) -> Any:
    """A PNG's transparent colour in 8 bits, before it is loaded; PIL scales its samples, and leaves this as it is."""
    colour, raw_mode = file.info.get("transparency"), _raw_mode(file)
    if isinstance(colour, int) and raw_mode in ("L;2", "L;4"):
        return colour * (85 if raw_mode == "L;2" else 17)
    if isinstance(colour, tuple) and raw_mode == "RGB;16B":
        return tuple(sample >> 8 for sample in colour)
    return colour


def _is_grey(file: Image.Image) -> bool:
    """Whether a picture that is not loaded yet holds no colours, of whatever depth."""
    return file.mode in GREY_MODES or file.mode.startswith(("I", "F")) or _raw_mode(file).startswith("LA")


def _raw_mode(file: Image.Image) -> str:
    """How a PNG that is not loaded yet holds its samples, in PIL's terms; nothing for other formats."""
    tiles = getattr(file, "tile", None)
    return str(tiles[0][3]) if file.format == "PNG" and tiles else ""


def _has_several(file: Image.Image) -> bool:
    """Whether a file has several frames, or pages that are no reduced copies of others."""
    if file.format == "MPO" or not getattr(file, "is_animated", False):  # MPO: a photo, and its depth or preview
        return False
    try:
        full_pages = (page for page in ImageSequence.Iterator(file) if not is_reduced(page))
        return file.format != "TIFF" or len([*islice(full_pages, 2)]) == 2
    except Exception:  # a page that is damaged is not used
        return True
    finally:
        file.seek(0)


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


def _resizable(image: Image.Image, depth: Depth, keep_cmyk: bool) -> Image.Image:
    """The same picture in L, RGB, RGBA, or CMYK if asked: the modes that can be resized without loss of meaning."""
    if image.mode.startswith(("I", "F")):
        return eight_bits(image, depth)
    check_channels(image, depth)
    if image.mode == "CMYK" and keep_cmyk:
        return image
    if image.mode == "La":  # grey multiplied by its alpha
        image = image.convert("LA")
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
