"""Colour spaces that a file names by numbers instead of an ICC profile, as the profile that they mean.

EXIF, as cameras write it: Adobe RGB by the tag ColorSpace (2) or the interoperability index (R03, of DCF 2.0), else
sRGB. PNG: the chunks cICP, sRGB, gAMA and cHRM (PNG, third edition, 4.3: in this order, an ICC profile after cICP).
JPEG 2000: the box colr (ISO/IEC 15444-1, I.5.3.3). AVIF: the box colr with code points (ISO/IEC 14496-12, 12.1.5). The
code points are those of ITU-T H.273.
"""

import functools
import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from finetune.data.pixels import BadImageError
from finetune.data.png_chunks import chunks

Primaries = tuple[float, ...]  # x, y of white, red, green and blue
D65 = (0.3127, 0.329)
SRGB_PRIMARIES: Primaries = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_CODED_PRIMARIES: dict[int, Primaries] = {
    1: SRGB_PRIMARIES,
    2: SRGB_PRIMARIES,  # "unspecified"
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    7: (*D65, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (*D65, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_SRGB_CURVE = 0.0  # instead of an exponent
_ADOBE_RGB = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256  # Adobe RGB (1998), 4.3.1
# Viewers show the curve of video (1, 6, 14, 15) as sRGB's: a video is graded on a display, not by its camera's curve.
_CODED_CURVES = dict.fromkeys((1, 2, 6, 13, 14, 15), _SRGB_CURVE) | {4: 2.2, 5: 2.8, 8: 1.0}
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
_ENUMERATED = {12, 15, 16, 17, 18, 0}  # of JPEG 2000: CMYK, bilevel, sRGB, grey, sYCC, bilevel; PIL converts sYCC
_ADAPT = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # Bradford
_D50 = np.array([0.9642, 1.0, 0.8249])
_CONTAINERS = {b"jp2h": 0, b"meta": 4, b"iprp": 0, b"ipco": 0}  # boxes of boxes, and bytes before the first


def profile_of(image: Image.Image, source: bytes | str) -> bytes | None:
    """The ICC profile of a picture: the one in it, or what its other tags mean; None for sRGB.

    Raises:
        BadImageError: the picture is of a high dynamic range, or of a colour space that is not known.
    """
    embedded: bytes | None = image.info.get("icc_profile")
    if image.format == "PNG":
        return _png_profile(chunks(source, (b"cICP", b"sRGB", b"gAMA", b"cHRM")), embedded)
    if image.format not in ("JPEG2000", "AVIF"):
        return embedded or (_matrix_profile(*_ADOBE_RGB) if _is_adobe_rgb(image) else None)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        boxes = list(_colour_boxes(file, 0, file.seek(0, io.SEEK_END)))
    if image.format == "AVIF":
        coded = [box for box in boxes if box[:4] == b"nclx" and len(box) >= 8]
        return embedded or (_coded(*struct.unpack(">HH", coded[0][4:8])) if coded else None)
    return _jpeg2000_profile(boxes)


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF of a picture without a profile says Adobe RGB, as cameras do that are set to it."""
    try:
        exif = image.getexif()
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex, "")
        return exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) == 2 or str(index).startswith("R03")
    except Exception:  # broken metadata says nothing about the pixels
        return False


def _png_profile(chunks: dict[bytes, bytes], embedded: bytes | None) -> bytes | None:
    if len(coded := chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full_range = coded
        if matrix or full_range != 1:
            raise BadImageError("has colours of video (cICP): convert it to sRGB")
        return _coded(primaries, transfer)
    if embedded or b"sRGB" in chunks:
        return embedded
    gamma = int.from_bytes(chunks.get(b"gAMA", b"")[:4], "big") / 100_000
    named = chunks.get(b"cHRM", b"")
    primaries_ = tuple(value / 100_000 for value in struct.unpack(">8I", named)) if len(named) == 32 else SRGB_PRIMARIES
    if np.abs(np.subtract(primaries_, SRGB_PRIMARIES)).max() < 0.002:
        primaries_ = SRGB_PRIMARIES
    # 1/2.2 is how programs write sRGB's own curve; libpng ignores differences of 5 % too.
    curve = _SRGB_CURVE if not gamma or abs(gamma * 2.2 - 1) < 0.05 else 1 / gamma
    return _matrix_profile(primaries_, curve)


def _jpeg2000_profile(boxes: list[bytes]) -> bytes | None:
    for box in boxes:
        if box[:1] in (b"\x02", b"\x03"):
            return box[3:]
        if box[:1] == b"\x01" and len(box) >= 7:
            space = int.from_bytes(box[3:7], "big")
            if space not in _ENUMERATED:
                raise BadImageError(f"has a colour space of JPEG 2000 that is not known (number {space})")
            return None
    return None


def _coded(primaries: int, transfer: int) -> bytes | None:
    """The profile of two code points."""
    if transfer in _HIGH_RANGE:
        raise BadImageError(f"is of a high dynamic range ({_HIGH_RANGE[transfer]}): convert it to sRGB")
    if primaries not in _CODED_PRIMARIES or transfer not in _CODED_CURVES:
        raise BadImageError(
            f"has a colour space that is not known (primaries {primaries}, transfer function {transfer}): convert it "
            "to sRGB"
        )
    return _matrix_profile(_CODED_PRIMARIES[primaries], _CODED_CURVES[transfer])


@functools.lru_cache(maxsize=64)
def _matrix_profile(primaries: Primaries, exponent: float) -> bytes | None:
    """An ICC profile (ICC.1:2001-04) of primaries and one curve; None for sRGB's, or if there is no such matrix."""
    if primaries == SRGB_PRIMARIES and exponent == _SRGB_CURVE:
        return None
    columns = np.array(primaries).reshape(4, 2)
    if (columns[:, 1] <= 0).any():
        return None
    white, *colours = ([x / y, 1, (1 - x - y) / y] for x, y in columns)
    matrix = np.array(colours).T
    if abs(np.linalg.det(matrix)) < 1e-6:
        return None
    matrix = matrix * np.linalg.solve(matrix, np.array(white))
    scale = (_ADAPT @ _D50) / (_ADAPT @ np.array(white))
    matrix = np.linalg.inv(_ADAPT) @ np.diag(scale) @ _ADAPT @ matrix
    x = np.linspace(0, 1, 1024)
    y = x**exponent if exponent else np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    curve = b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *np.rint(y * 65535).astype(int))
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 6) + b"coded\0".ljust(84, b"\0"), b"wtpt": _xyz(_D50)}
    tags |= {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    body, table, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *np.rint(values * 65536).astype(int))


def _colour_boxes(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The contents of the boxes colr between two places of a file of boxes."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1:
            size, content = int.from_bytes(file.read(8), "big"), start + 16
        stop = min(start + size, end) if size else end
        if stop < content:
            return
        if name in _CONTAINERS:
            yield from _colour_boxes(file, content + _CONTAINERS[name], stop)
        elif name == b"colr":
            file.seek(content)
            yield file.read(stop - content)
        start = stop
