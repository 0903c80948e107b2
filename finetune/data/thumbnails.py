"""Thumbnails among pictures: told by a name as programs give them, and by the larger picture that each is a copy of.

A name alone says little: a class may be named thumbs, and hand_thumb.png may show a part of hand.png. So a picture is
left out only if its original is there too: of the same name without what marks a thumbnail, in the same folder, the one
above or one beside, larger, and, reduced to a few pixels, the same to the eye.
"""

import os
import re
from collections.abc import Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from finetune.data.formats import FORMATS

SERVER = re.compile(r"syno(photo|file|video|index)_(thumb|screenshot|media_info|film).*", re.IGNORECASE)  # Synology
_FOLDER = re.compile(r"[._]?(thumb(nail)?s?|tn|previews?|derivatives)", re.IGNORECASE)
# x-150x150 (WordPress), x_thumb, x.thumbnail, tn_x, thumb_x
_FILE = re.compile(
    r"(?:tn|thumb(?:nail)?)[-_](?P<after>.+)|(?P<before>.+?)[-_.](?:tn|thumb(?:nail)?|\d+x\d+)", re.IGNORECASE
)
_PIXELS = 16  # a side, of the pictures that are compared
_APART = 12  # of 255, on average: JPEG and sharpening leave about 3 between a picture and its copy


def thumbnails(path: str, files: Iterable[str]) -> set[str]:
    """Those of some pictures, relative to `path`, that are thumbnails of others among them."""
    files = list(files)
    by_stem: dict[str, list[str]] = {}
    for file in files:
        by_stem.setdefault(_stem(file).lower(), []).append(file)
    is_copy = partial(_is_copy, path)
    return {file for file in files if any(is_copy(file, other) for other in _originals(file, by_stem))}


def _originals(file: str, by_stem: dict[str, list[str]]) -> list[str]:
    """The pictures that a file would be a thumbnail of, by its name."""
    folder, stem = os.path.dirname(file), _stem(file)
    match = _FILE.fullmatch(stem)
    name = (match["after"] or match["before"]) if match else stem
    # WordPress reduces large pictures to x-scaled, and makes thumbnails x-150x150 of them.
    same_name = [*by_stem.get(name.lower(), ()), *by_stem.get(f"{name}-scaled".lower(), ())] if match else []
    if not _FOLDER.fullmatch(os.path.basename(folder)):
        return [other for other in same_name if os.path.dirname(other) == folder]
    above = os.path.dirname(folder)
    homes = [(other, os.path.dirname(other)) for other in (*by_stem[stem.lower()], *same_name)]
    return [other for other, home in homes if home == above or (home != folder and os.path.dirname(home) == above)]


def _is_copy(path: str, file: str, other: str) -> bool:
    """Whether a picture is a smaller copy of another, of all or of its middle."""
    try:
        with _opened(path, file) as small, _opened(path, other) as large:
            size = small.size
            if size == large.size or any(one > another for one, another in zip(size, large.size, strict=True)):
                return False
            large.draft("L", (8 * _PIXELS, 8 * _PIXELS))
            copy, whole = _upright_grey(small), _upright_grey(large)
            few = _few_pixels(copy)
            originals = whole, ImageOps.fit(whole, copy.size)
            return any(np.abs(few - _few_pixels(original)).mean() < _APART for original in originals)
    except Exception:  # what cannot be opened is reported where it is decoded
        return False


def _opened(path: str, file: str) -> Image.Image:
    return Image.open(os.path.join(path, file), formats=FORMATS)


def _upright_grey(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("L")


def _few_pixels(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(image.resize((_PIXELS, _PIXELS), Image.Resampling.BOX), dtype=np.float64)


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]
