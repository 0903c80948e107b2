"""Files that do not hold what their name says, found before a library fails on them with a message of its own."""

import csv
import json
import os
import re
import tarfile
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.core.errors import UserError, first_few, first_line

POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(source: bytes | str) -> bool:
    """Whether bytes, or the file at a path, are a pointer that git-lfs has not yet replaced by the file itself."""
    if isinstance(source, bytes):
        return source.startswith(POINTER)
    if not os.path.isfile(source) or _is_locked(source):  # whoever reads it next says so
        return False
    with open(source, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def _is_locked(file: str) -> bool:
    return not os.access(file, os.R_OK)


def check_files(files: Iterable[str]) -> None:
    """Raises UserError if any of the files may not be read, is a git-lfs pointer or is empty."""
    files = list(files)
    for problem, advice, wrong in (
        ("no permission to read a file", "change its permissions, or leave it out", _is_locked),
        ("a git-lfs pointer instead of a file", "run `git lfs pull` in its repository", is_pointer),
        ("an empty file", "copy or download it again, or remove it", lambda file: os.path.getsize(file) == 0),
    ):
        if found := [file for file in files if wrong(file)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UserError(f"data.source: found {problem}: {found[0]}{more}; {advice}")


def check_metadata(file: str) -> None:
    """Raises UserError if a metadata file names no picture or is not UTF-8."""
    if is_pointer(file):
        check_files([file])
    try:
        columns, rows = _columns_and_rows(file)
    except UnicodeDecodeError as error:
        raise UserError(f"data.source: {file}: found no UTF-8 at byte {error.start}; expected text in UTF-8") from None
    except (ValueError, pa.ArrowException) as error:
        raise UserError(f"data.source: {file}: cannot be read: {first_line(error)}") from None
    if rows <= 0:
        raise UserError(
            f"data.source: {file}: found no rows; expected one for each picture: fill it, or remove it to use all "
            "pictures in its folder"
        )
    if not any(re.fullmatch("(.*_)?file_names?", name) for name in columns):
        found = first_few(map(repr, columns), 10)
        between = ", with commas between them" if file.lower().endswith(".csv") and len(columns) == 1 else ""
        raise UserError(f"data.source: {file}: found the columns {found}; expected file_name among them{between}")


def _columns_and_rows(file: str) -> tuple[list[str], int]:
    """A metadata file's columns, and how many rows it has."""
    if file.lower().endswith(".parquet"):
        metadata = pq.read_metadata(file)
        return metadata.schema.to_arrow_schema().names, metadata.num_rows
    with open(file, encoding="utf-8-sig", newline="") as opened:
        lines = (line for line in opened if line.strip())
        first = next(lines, "")
        rest = sum(1 for _ in lines)
    if file.lower().endswith(".csv"):
        return next(csv.reader([first]), []), rest
    row = json.loads(first or "{}")
    if not isinstance(row, dict):
        raise ValueError("its first line is no mapping; expected {...} for each picture, a line each")
    return list(row), rest + bool(first)


def broken_table(reader: str, files: Iterable[str]) -> str | None:
    """The parquet or tar file that made reading fail, and why, in words; None if each can be read by itself."""
    columns: dict[str, list[str]] = {}
    for file in files:
        try:
            if reader == "parquet":
                columns[file] = sorted(pq.read_schema(file).names)
            elif reader == "webdataset":
                with tarfile.open(file) as archive:
                    archive.getmembers()
        except (OSError, tarfile.TarError, pa.ArrowException) as error:
            return f"{file} is damaged or of another type: {first_line(error)}"
    for file, names in columns.items():
        first, expected = next(iter(columns.items()))
        if names != expected:
            found = f"{', '.join(names)} in {file} and {', '.join(expected)} in {first}"
            return f"found the columns {found}; expected the same in all files"
    return None
