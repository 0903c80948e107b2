"""Metadata files, read value by value: what a person wrote is what is read.

`datasets` reads them with pandas, which takes the names NA, None and null for missing values, 007 for 7 and a row with
one value too many for one with an index, and it takes the columns from the first of several files.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from finetune.core.errors import UserError, first_few, first_line

Columns = dict[str, list[Any]]
PICTURE_NAME = re.compile(r"(?:(.*)_)?file_name")
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCALARS = (bool, int, float, str)


def read_metadata(path: str, files: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """The rows of metadata files, a column that one of them lacks being empty there, sorted by picture.

    Args:
        path: the folder that `files` are relative to.

    Returns:
        The table, whose columns of pictures hold {"bytes", "path"}, and the names of these columns.

    Raises:
        UserError: a file cannot be read, names pictures outside `path`, or a column holds values of several types.
    """
    folders = [os.path.dirname(file) for file in files]
    for file, folder in zip(files, folders, strict=True):
        if folders.count(folder) > 1:
            raise UserError(
                f"data.source: {path}: found several metadata files in one folder, {file} among them; expected one"
            )
    tables: list[tuple[str, Columns]] = []
    for file in files:
        full = os.path.join(path, file)
        columns = READERS[os.path.splitext(file)[1].lower()](full)
        tables.append((full, _with_pictures(columns, path, full)))
    pictures = sorted({name for _, columns in tables for name in columns if isinstance(columns[name], Pictures)})
    merged: Columns = {name: [] for _, columns in tables for name in columns}
    texts = {name for name in merged if all(type(columns.get(name, Texts())) is Texts for _, columns in tables)}
    for _, columns in tables:
        count = len(next(iter(columns.values())))
        for name, values in merged.items():
            values += columns.get(name, [None] * count)
    arrays = {
        name: _array(name, values, name in texts, files) for name, values in merged.items() if name not in pictures
    }
    arrays = {name: pa.array(merged[name], PICTURE) for name in pictures} | arrays
    table = pa.table(arrays)
    if pictures:
        first = table.column(pictures[0]).combine_chunks().field("path")
        table = table.take(pc.sort_indices(pa.table({"path": first}), sort_keys=[("path", "ascending")]))
    return table, pictures


class Texts(list[Any]):
    """Values of a column of a text file, whose type is still open; None where there is nothing."""


class Pictures(list[Any]):
    """Values of a column of pictures."""


def _read_csv(file: str) -> Columns:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, skipinitialspace=True, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:  # a quote without its end would take the rows after it into one value
            raise _broken(file, reader.line_num, f"{error} (a quote that is opened has to be closed)") from None
    _, names = rows.pop(0)
    columns: Columns = {name.strip(): Texts() for name in names}
    if len(columns) < len(names):
        raise UserError(f"data.source: {file}: found the columns {', '.join(names)}; expected a name for each")
    for line, row in rows:
        if len(row) != len(names):
            raise _broken(
                file,
                line,
                f"found {len(row)} values; expected {len(names)}, one for each column (a comma inside a value needs "
                "quotes around it)",
            )
        for values, value in zip(columns.values(), row, strict=True):
            values.append(value or None)
    return columns


def _read_jsonl(file: str) -> Columns:
    rows = []
    with open(file, encoding="utf-8-sig") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                try:
                    row = json.loads(line, object_pairs_hook=_mapping)
                except ValueError as error:
                    raise _broken(file, number, first_line(error)) from None
                if not isinstance(row, dict):
                    raise _broken(file, number, "expected a mapping, {...}")
                rows.append(row)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON, whose keys may not repeat: Python would take the last, in silence."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"found the key {next(name for name in names if names.count(name) > 1)!r} twice; expected one")
    return mapping


def _broken(file: str, line: int, problem: str) -> UserError:
    return UserError(f"data.source: {file}: line {line}: {problem}")


def _read_parquet(file: str) -> Columns:
    table = pq.read_table(file)
    return {name: table.column(name).to_pylist() for name in table.column_names}


READERS: dict[str, Callable[[str], Columns]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _with_pictures(columns: Columns, root: str, file: str) -> Columns:
    """The columns named file_name and x_file_name as pictures, named image and x."""
    found: Columns = {}
    for name, values in columns.items():
        if (match := PICTURE_NAME.fullmatch(name)) is None:
            found.setdefault(name, values)
        else:
            found[match[1] or "image"] = Pictures(_picture(value, root, file) for value in values)
    return found


def _picture(value: Any, root: str, file: str) -> dict[str, Any] | None:
    """What a column of pictures holds for the name of a file: one relative to the metadata file, or a full path."""
    if value is None:
        return None
    path = None
    if isinstance(value, str) and "://" not in value:
        path = _inside(root, os.path.normpath(os.path.join(os.path.dirname(file), value.replace("\\", "/"))))
    if path is None:
        raise UserError(f"data.source: {file}: found the file_name {value!r}; expected a name inside {root}")
    return {"bytes": None, "path": path}


def _inside(root: str, path: str) -> str | None:
    """A path as one below `root`, which may also be reached by another name, through links; None if it is outside."""
    below = root.rstrip(os.sep) + os.sep
    if path.startswith(below):
        return path
    real, name = os.path.split(path)
    real, below = os.path.join(os.path.realpath(real), name), os.path.join(os.path.realpath(root), "")
    return os.path.join(root, real.removeprefix(below)) if real.startswith(below) else None


def _array(name: str, values: list[Any], texts: bool, files: Sequence[str]) -> pa.Array:
    """Values as an array: of texts all that are integers as a person writes them are integers, or all are numbers."""
    if texts:
        given = [value for value in values if value is not None]
        for pattern, kind in ((r"-?(0|[1-9]\d{0,17})", int), (r"-?(0|[1-9]\d*)\.\d+([eE][+-]?\d+)?", float)):
            if given and all(re.fullmatch(pattern, value) for value in given):
                return pa.array([None if value is None else kind(value) for value in values])
        return pa.array(values, pa.string())
    kinds = {
        next((kind for kind in SCALARS if isinstance(value, kind)), None): value
        for value in values
        if value is not None
    }
    if len(kinds) > 1 and set(kinds) != {int, float}:
        examples = " and ".join(repr(value)[:50] for value in list(kinds.values())[:2])
        raise UserError(f"data.source: found {examples} in {name!r} of {first_few(files)}; expected values of one type")
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"data.source: {name!r} of {first_few(files)} cannot be read: {first_line(error)}") from None
