"""Samples that are not 8-bit channels, as those that a viewer shows; what no convention makes a picture is refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.pixels import BadImageError

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE, INK_SET, SAMPLE_FORMAT = 258, 262, 281, 332, 339  # TIFF's tags
WHITE_IS_ZERO, OTHER_INKS, UNSIGNED, SIGNED = 0, 2, 1, 2  # values of three of them
DIMMEST = 1 / 8  # of white: where only a picture's own values tell what white is, at least one of them is so bright


def check_channels(image: Image.Image) -> None:
    """Raises BadImageError for channels that PIL reads as something else than the TIFF file says."""
    tags = tiff_tags(image)
    if tags and image.mode == "L" and _first(tags, SAMPLE_FORMAT, 1) == SIGNED:
        raise BadImageError("has signed samples of 8 bits, which PIL reads as unsigned")
    if tags and image.mode == "CMYK" and _first(tags, INK_SET, 1) == OTHER_INKS:
        raise BadImageError("has inks other than cyan, magenta, yellow and black")
    if tags and _first(tags, BITS_PER_SAMPLE, 8) == 16:  # PIL keeps the upper byte of each sample
        most = _first(tags, MAX_SAMPLE, 65535)
        if most < 65535:
            raise BadImageError(f"has colours of 16 bits with values up to {most}, of which PIL reads the upper 8 only")


def eight_bits(image: Image.Image) -> Image.Image:
    """Samples of more than 8 bits, scaled so that the brightest value of the format becomes 255."""
    tags, values = tiff_tags(image), np.asarray(image, dtype=np.float64)
    if tags and image.mode == "I" and _first(tags, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        values = np.where(values < 0, values + 2**32, values)  # PIL holds 32 bits as signed integers
    peaks = _peaks(image)
    brightest = values.max()
    peak = next((peak for peak in peaks if brightest <= peak), None)
    if peak is None or not values.min() >= 0:  # not: a NaN is bad too
        raise BadImageError(f"has values from {values.min():g} to {brightest:g}, expected 0 to {peaks[-1]}")
    if peak > peaks[0] and brightest < peak * DIMMEST:
        raise BadImageError(
            f"has values up to {brightest:g}, and nothing says which value is white: save it with samples of 8 bits"
        )
    scaled = (values * (255 / peak) + 0.5).astype(np.uint8)
    if _first(tags, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    grey = Image.fromarray(scaled)
    grey.info = image.info
    if "transparency" not in image.info:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey.convert("RGBA")


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF file; none of a picture in another format."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _first(tags: Mapping[int, Any], tag: int, default: int) -> int:
    """The first value of a TIFF tag, which may have one for each channel."""
    value = tags.get(tag, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _peaks(image: Image.Image) -> tuple[int, ...]:
    """The values that may stand for white, of which the smallest that no sample exceeds does.

    A file that says how many bits or which values its samples have leaves no choice. Signed integers, those of 32 bits
    and floats come without a convention: `datasets` writes 8-bit values as 32-bit TIFFs, other programs write the
    numbers of an array in its own type, and floats are 0..1, 0..255 or 0..65535.
    """
    if image.mode == "F":
        return (1, 255, 65535)
    if image.format != "TIFF":
        return (65535,)  # PNG, PGM and JPEG 2000 are scaled to 16 bits by PIL
    tags = tiff_tags(image)
    bits, signed = _first(tags, BITS_PER_SAMPLE, 16), _first(tags, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    most = _first(tags, MAX_SAMPLE, 0)
    if most > 0 and (most + 1).bit_count() == 1:  # 2^k - 1 is a depth; any other value only a statistic of this picture
        return (most,)
    if bits < 32:
        return (255, 2 ** (bits - 1) - 1) if signed else (2**bits - 1,)
    return (255, 65535, 2 ** (bits - signed) - 1)
