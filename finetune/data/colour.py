"""Colour profiles: pictures are converted to sRGB by PIL's ImageCms."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
ROUNDING = 3  # levels of 255 by which a profile of sRGB may differ from another


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The picture with the colours of its ICC profile converted to sRGB; a broken or absent profile counts as sRGB."""
    fallback = image.convert("RGB") if image.mode == "CMYK" else image
    space = _colour_space(profile) if profile else None
    if profile is None or space is None:
        return fallback
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    source = image.convert("RGB") if space == "RGB" and image.mode != "CMYK" else image
    if space == "GRAY" and alpha is not None:  # a grey picture that was made RGBA for its transparency
        source = image.getchannel("R")
    convert = _transform(profile, source.mode)
    if convert is None:
        return fallback
    converted = convert.apply(source)
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info = image.info
    return converted


def _colour_space(profile: bytes) -> str | None:
    """RGB, GRAY, CMYK, ...; None if the profile is broken or already sRGB, where converting would only round."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        is_srgb = ImageCms.getProfileDescription(opened).startswith("sRGB")
        space: str = opened.profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None
    return None if is_srgb and _changes_little(profile, space) else space


@functools.lru_cache(maxsize=64)
def _changes_little(profile: bytes, space: str) -> bool:
    """Whether a profile that is named sRGB is sRGB; some of that name are of linear light or of wider colours."""
    convert = _transform(profile, "RGB") if space == "RGB" else None
    if convert is None:
        return space == "RGB"
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, 256, 3)
    converted = np.asarray(convert.apply(Image.fromarray(grid)), dtype=int)
    return bool(np.abs(converted - grid).max() <= ROUNDING)


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB, for pictures of a mode; None if the profile is of another kind of colour."""
    flags = ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION  # no cache: threads share a transform
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        return ImageCms.buildTransform(opened, SRGB, mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
