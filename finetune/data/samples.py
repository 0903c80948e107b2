"""Converts samples other than 8-bit channels to what a viewer shows; refuses those that have no agreed meaning."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from finetune.data.pixels import BadImageError
from finetune.data.png_chunks import chunks

SUBFILE_TYPE, SUB_PICTURES = 254, 330  # TIFF's tags
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, INK_SET, SAMPLE_FORMAT = 258, 262, 281, 332, 339
WHITE_IS_ZERO, OTHER_INKS, UNSIGNED, SIGNED, REDUCED = 0, 2, 1, 2, 1  # values of some of them
MOST = 65535  # of 16 bits
DIMMEST = 1 / 8  # of white: where only a picture's own values tell what white is, at least one of them is so bright
# White is 65535 unless the file names another. A picture of 16 bits that nowhere exceeds this is that of a sensor of 12
# bits, or so dark that nothing can be seen in it.
TOO_DARK = 4095


def to_full_page(image: Image.Image) -> None:
    """Go to the first page of a TIFF file that is no reduced copy of another page.

    Raises:
        BadImageError: there is none, and the picture itself is where PIL does not look.
    """
    if not is_reduced(image):
        return
    if SUB_PICTURES in tiff_tags(image):
        raise BadImageError("holds a reduced copy beside a picture that Pillow does not read, as a camera's raw file")
    for page in range(1, getattr(image, "n_frames", 1)):
        image.seek(page)
        if not is_reduced(image):
            return
    image.seek(0)


def is_reduced(image: Image.Image) -> bool:
    """Whether a page says that it is a smaller copy of another."""
    return bool(_first(tiff_tags(image), SUBFILE_TYPE, 0) & REDUCED)


class Depth(NamedTuple):
    """Of samples in a file, which PIL may hold in other types."""

    sixteen: bool  # bits a sample
    white: int | None  # the value that the file says is white; None if it says nothing of it


def depth_of(image: Image.Image, source: bytes | str) -> Depth:
    """The depth of a picture's samples; before it is loaded."""
    tags = tiff_tags(image)
    if tags:
        most = _first(tags, MAX_SAMPLE, 0)
        # 2^k - 1 is a depth; any other value only a statistic of this picture
        is_depth = most > 0 and (most + 1).bit_count() == 1
        return Depth(_first(tags, BITS_PER_SAMPLE, 8) == 16, most if is_depth else None)
    if image.format != "PNG":
        return Depth(False, MOST)  # PGM and JPEG 2000 name their depth, and are scaled to 16 bits by PIL
    tile = getattr(image, "tile", None)
    if not tile or not str(tile[0][3]).endswith("16B"):
        return Depth(False, None)
    bits = min(chunks(source, (b"sBIT",)).get(b"sBIT") or b"\0")
    return Depth(True, 2 ** min(bits, 16) - 1 if bits else None)


def has_unused_alpha(head: bytes) -> bool:
    """Whether a TGA file of 32 bits says that none of them are transparency; PIL takes 8 for it all the same."""
    return len(head) > 17 and head[16] == 32 and not head[17] & 0x0F


def check_channels(image: Image.Image, depth: Depth) -> None:
    """Raises BadImageError for channels that PIL reads as something else than the file says."""
    tags = tiff_tags(image)
    if tags and image.mode == "L" and _first(tags, SAMPLE_FORMAT, 1) == SIGNED:
        raise BadImageError("has signed samples of 8 bits, which PIL reads as unsigned")
    if tags and image.mode == "CMYK" and _first(tags, INK_SET, 1) == OTHER_INKS:
        raise BadImageError("has inks other than cyan, magenta, yellow and black")
    if not depth.sixteen or depth.white == MOST:
        return
    if tags and depth.white is not None:
        raise BadImageError(
            f"has colours of 16 bits with values up to {depth.white}, of which PIL reads the upper 8 only: "
            f"{_advice(image)}"
        )
    if image.mode not in ("RGB", "RGBA"):
        return
    samples = np.asarray(image)
    brightest = samples[..., :3].max()
    is_drawn_by_alpha = image.mode == "RGBA" and brightest == 0 and samples[..., 3].min() < 255
    if brightest <= TOO_DARK >> 8 and not is_drawn_by_alpha:
        raise BadImageError(f"has 16 bits and no value above {TOO_DARK} of {MOST}: {_advice(image)}")


def eight_bits(image: Image.Image, depth: Depth) -> Image.Image:
    """Samples of more than 8 bits, scaled so that the brightest value of the format becomes 255."""
    white = depth.white
    tags, values = tiff_tags(image), np.asarray(image, dtype=np.float64)
    if tags and image.mode == "I" and _first(tags, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        values = np.where(values < 0, values + 2**32, values)  # PIL holds 32 bits as signed integers
    brightest = values.max()
    if image.format == "PNG" and white and brightest <= white < MOST and (values % ((MOST + 1) // (white + 1))).any():
        peaks: tuple[int, ...] = (white,)  # a PNG says its significant bits, and should have scaled them to 16
    else:
        peaks = _peaks(image, white)
    peak = next((peak for peak in peaks if brightest <= peak), None)
    if peak is None or not values.min() >= 0:  # not: a NaN is bad too
        raise BadImageError(f"has values from {values.min():g} to {brightest:g}, expected 0 to {peaks[-1]}")
    if peak > peaks[0] and brightest < peak * DIMMEST:
        raise BadImageError(
            f"has values up to {brightest:g}, and nothing says which value is white: save it with samples of 8 bits"
        )
    if peaks == (MOST,) and white is None and 0 < brightest <= TOO_DARK:
        raise BadImageError(f"has 16 bits and values up to {brightest:g} of {MOST}: {_advice(image)}")
    scaled = (values * (255 / peak) + 0.5).astype(np.uint8)
    if _first(tags, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    grey.info = image.info
    if "transparency" not in image.info:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def _advice(image: Image.Image) -> str:
    """What makes clear which value is white."""
    tagged = (
        "set its tag 281 (MaxSampleValue) to the value that is white, such as 4095, or "
        if (image.format == "TIFF" and image.mode.startswith("I"))
        else ""
    )
    return f"{tagged}save it with white at {MOST}, or with samples of 8 bits"


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF file; none of a picture in another format."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _first(tags: Mapping[int, Any], tag: int, default: int) -> int:
    """The first value of a TIFF tag, which may have one for each channel."""
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _peaks(image: Image.Image, white: int | None) -> tuple[int, ...]:
    """The values that may stand for white, of which the smallest that no sample exceeds does.

    A file that says how many bits or which values its samples have leaves no choice. Signed integers, those of 32 bits
    and floats come without a convention: `datasets` writes 8-bit values as 32-bit TIFFs, other programs write the
    numbers of an array in its own type, and floats are 0..1, 0..255 or 0..65535.
    """
    if image.mode == "F":
        return (1, 255, MOST)
    if image.format != "TIFF":
        return (MOST,)
    if white is not None:
        return (white,)
    tags = tiff_tags(image)
    bits, signed = _first(tags, BITS_PER_SAMPLE, 16), _first(tags, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    if bits < 32:
        return (255, 2 ** (bits - 1) - 1) if signed else (2**bits - 1,)
    return (255, MOST, 2 ** (bits - signed) - 1)
