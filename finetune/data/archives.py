"""Tar files, walked before `datasets` reads them: it stops at the first header that it cannot read, without a word.

It also takes the columns from the first rows, ends a row where the next name begins, and passes over files without an
extension. What would be lost that way is refused here.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator

import datasets
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext
from PIL import Image, UnidentifiedImageError

from finetune.core.errors import UserError, first_few, first_line
from finetune.data.formats import FORMATS, PICTURES

BLOCK = 512
INTEGERS = {"cls", "cls2", "index", "inx", "id"}  # files that `datasets` reads as an integer
Row = tuple[str, str, list[str]]  # archive, name, extensions


def check_archives(files: list[str], first: str) -> None:
    """Raises UserError if something of tar files would be lost. Files that have passed are not walked again.

    Args:
        first: the file whose first row gives the columns.
    """
    states = [(file, first, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = hashlib.blake2b(repr(states).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    passed = os.path.join(datasets.config.HF_DATASETS_CACHE, "checked", key)
    if os.path.exists(passed):
        return
    rows = {file: list(_rows(file)) for file in files}
    if not any(rows.values()):
        raise UserError(
            f"data.source: found no rows in {_named(files)}; expected pictures with an extension, as 0001.jpg"
        )
    _check_columns(files, rows, first)
    os.makedirs(os.path.dirname(passed), exist_ok=True)
    open(passed, "w").close()


def _rows(file: str) -> Iterator[Row]:
    """The rows of an archive as `datasets` finds them: runs of files that share a name up to its first dot."""
    row: Row | None = None
    seen: set[str] = set()
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                if not member.isfile():
                    _refuse_lost_link(file, member)
                    continue
                name, kind = base_plus_ext(member.name)
                if name is None:
                    _refuse_lost_picture(file, archive, member)
                    continue
                if os.path.basename(member.name).startswith("."):
                    raise UserError(
                        f"data.source: {file}: found the hidden file {member.name!r}, which would become a row of its "
                        "own; pack the files again without it (on macOS with COPYFILE_DISABLE=1 before tar)"
                    )
                if kind.rsplit(".", 1)[-1].lower() in INTEGERS:
                    _check_integer(file, archive, member)
                if row is None or row[1] != name:
                    if row is not None:
                        yield row
                    if name in seen:
                        raise UserError(
                            f"data.source: {file}: the files of {name!r} do not follow one another, so that each would "
                            "be a row of its own; pack them again in the order of their names (tar --sort=name)"
                        )
                    seen.add(name)
                    row = file, name, []
                row[2].append(kind)
            if row is not None:
                yield row
            _check_end(file, archive)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"data.source: {file} is damaged or of another type: {first_line(error)}") from None


def _check_end(file: str, archive: tarfile.TarFile) -> None:
    """Raises UserError unless an archive ends with its marker, a block of zeros, and nothing follows but zeros."""
    stream = archive.fileobj
    assert stream is not None
    stream.seek(archive.offset)
    end = stream.read(BLOCK)
    if len(end) < BLOCK or any(end):
        what = "is cut off" if len(end) < BLOCK else "is damaged"
        raise UserError(
            f"data.source: {file} {what} at byte {archive.offset:,}, where a file or the end of the archive was "
            "expected; copy or download it again"
        )
    while block := stream.read(2**20):
        if any(block):
            raise UserError(
                f"data.source: {file} goes on after its end, as joined archives do, and only the first would be read; "
                "unpack it (tar --ignore-zeros) and pack it again"
            )


def _check_columns(files: list[str], rows: dict[str, list[Row]], first: str) -> None:
    everything = [row for found in ([rows[first]] + [rows[file] for file in files]) for row in found]
    _, reference, columns = everything[0]
    for _, name, kinds in everything:
        if more := [kind for kind in kinds if kind not in columns]:
            pictures = any("." + kind.rsplit(".", 1)[-1].lower() in PICTURES for kind in more)
            what = "rows with pictures of different types" if pictures else "rows with different files"
            dotted = [", ".join(sorted(f".{kind}" for kind in some)) for some in (columns, kinds)]
            raise UserError(
                f"data.source: found {what} in {_named(files)}: {reference!r} has {dotted[0]} and {name!r} has "
                f"{dotted[1]}; expected {'one type' if pictures else 'the same'} in all rows: "
                f"{'convert them, or ' if pictures else ''}unpack the files and set data.source to the folder"
            )


def _check_integer(file: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    content = archive.extractfile(member)
    text = content.read(100) if content is not None else b""
    try:
        int(text)
    except ValueError:
        raise UserError(
            f"data.source: {file}: found {text!r} in {member.name!r}, expected an integer; texts are named .txt"
        ) from None


def _refuse_lost_picture(file: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    content = archive.extractfile(member)
    if os.path.basename(member.name).startswith(".") or content is None:
        return
    try:
        Image.open(io.BytesIO(content.read()), formats=FORMATS).close()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return
    raise UserError(
        f"data.source: {file}: found the picture {member.name!r}, which would be left out; expected an extension, as "
        "in 0001.jpg"
    )


def _refuse_lost_link(file: str, member: tarfile.TarInfo) -> None:
    if (member.issym() or member.islnk()) and base_plus_ext(member.name)[0] is not None:
        raise UserError(
            f"data.source: {file}: found {member.name!r}, a link to {member.linkname!r}, which would be left out; pack "
            "the files themselves (tar --dereference --hard-dereference)"
        )


def _named(files: list[str]) -> str:
    return first_few(map(os.path.basename, files))
