"""Chunks of a PNG file that PIL does not give, or not as they are."""

import io
from collections.abc import Collection
from typing import BinaryIO

_LONGEST = 32  # bytes of the chunks that are asked for: cHRM has as many


def chunks(source: bytes | str, names: Collection[bytes]) -> dict[bytes, bytes]:
    """Those of some chunks that stand before a PNG's pixels, by name; of two of one name the last.

    Args:
        source: an encoded picture, or the path of one.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        return _chunks(file, names)


def _chunks(file: BinaryIO, names: Collection[bytes]) -> dict[bytes, bytes]:
    found = {}
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        if name in (b"IDAT", b"IEND"):
            break
        if name in names:
            found[name] = file.read(min(length, _LONGEST))
            length -= min(length, _LONGEST)
        file.seek(length + 4, io.SEEK_CUR)
    return found
