"""Files as datasets: tables from parquet, arrow and tar files, and pictures with or without metadata files."""

import glob
import hashlib
import os
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from finetune.core.errors import UserError
from finetune.data.damage import broken_table, check_files, check_metadata, differing_rows
from finetune.data.formats import PICTURES
from finetune.data.listing import EXAMPLES, by_kind


def build(name: str, **options: Any) -> dict[str, datasets.Dataset]:
    """The splits of what `datasets.load_dataset` would load."""
    builder = datasets.load_dataset_builder(name, **options)
    builder.download_and_prepare()
    splits: dict[str, datasets.Dataset] = builder.as_dataset()
    return splits


def build_tables(reader: str, files: dict[str, list[str]], **options: Any) -> dict[str, datasets.Dataset]:
    """Tables from the paths of parquet, arrow or tar files, by split."""
    paths = [file for split in files.values() for file in split]
    check_files(paths)
    patterns = {split: [glob.escape(file) for file in paths] for split, paths in files.items()}
    try:
        tables = build(reader, data_files=patterns, **options)
    except Exception as error:
        if reader == "webdataset" and isinstance(error, ValueError) and (problem := differing_rows(paths, PICTURES)):
            raise _different_types(paths, problem) from None
        if problem := broken_table(reader, paths):
            raise UserError(f"data.source: {problem}") from None
        raise
    if reader == "webdataset":  # `datasets` compares the first five rows, and leaves out other files of later ones
        pictures = {column for table in tables.values() for column in _picture_columns(table)}
        incomplete = any(
            all(table.data.column(name).null_count for name in pictures) for table in tables.values() if pictures
        )
        if incomplete and (problem := differing_rows(paths, PICTURES)):
            raise _different_types(paths, problem)
    return tables


def _different_types(files: list[str], problem: str) -> UserError:
    names = ", ".join(map(os.path.basename, files[:EXAMPLES])) + (", ..." if len(files) > EXAMPLES else "")
    return UserError(
        f"data.source: found rows with pictures of different types in {names}: {problem}; expected one type in all "
        "rows: convert them, or unpack the files and set data.source to the folder"
    )


def build_pictures(path: str, splits: dict[str, list[str]], drop_labels: bool | None) -> dict[str, datasets.Dataset]:
    """What `imagefolder` makes of pictures without metadata: paths, and their folders as labels if all are as deep.

    It would itself take 0.2 ms a picture, at every start, to see whether any has changed; this takes a tenth of that.

    Args:
        drop_labels: whether to leave labels out; None decides by the folders.
    """
    everything = [file for files in splits.values() for file in files]
    classes = {file: os.path.basename(os.path.dirname(os.path.join(path, file))) for file in everything}
    label = datasets.ClassLabel(names=sorted(set(classes.values())))
    labelled = label.num_classes > 1 and len({file.count(os.sep) for file in classes}) == 1
    if drop_labels is not None:
        labelled = not drop_labels
    features = datasets.Features({"image": datasets.Image(decode=False)} | ({"label": label} if labelled else {}))
    tables = {}
    for split, files in sorted(splits.items()):
        paths = [os.path.join(path, file) for file in files]
        columns: dict[str, Any] = {"image": [{"bytes": None, "path": path} for path in paths]}
        columns["label"] = label.str2int([classes[file] for file in files])
        table = pa.table({name: columns[name] for name in features}, features.arrow_schema)
        identity = repr((features, [_state(path) for path in paths])).encode()
        tables[split] = datasets.Dataset(table, fingerprint=hashlib.blake2b(identity, digest_size=8).hexdigest())
    return tables


def build_described(
    path: str, splits: dict[str, list[str]], metadata: list[str], explicit: bool
) -> dict[str, datasets.Dataset]:
    """Pictures with the columns of metadata files. All files of a folder are passed on, so that changes are noticed."""
    for file in metadata:
        check_metadata(os.path.join(path, file))
    patterns: dict[str, list[str]] = {}
    for split, files in splits.items():
        folders = {file.split(os.sep)[0] for file in files}
        if explicit:
            names = [glob.escape(file) for file in files]  # a bracket in a name would be part of the pattern
            described = not set(metadata).isdisjoint(files)
        elif list(splits) == ["train"]:
            names, described = ["**"], True
        else:
            names = [os.path.join(glob.escape(folder), "**") for folder in sorted(folders)]
            described = any(file.split(os.sep)[0] in folders for file in metadata)
        if described:  # a split without metadata would have no rows, which `datasets` cannot load
            patterns[split] = [os.path.join(glob.escape(path), name) for name in names]
    tables = build("imagefolder", data_files=patterns)
    # Several metadata files are read in an order that differs from run to run.
    return {split: _by_path(table) for split, table in tables.items()}


def unnamed(path: str, files: list[str], tables: dict[str, datasets.Dataset]) -> list[str]:
    """A note on pictures that no row of the metadata names."""
    named: set[str] = set()
    for table in tables.values():
        for column in _picture_columns(table):
            pictures = table.data.column(column)
            named |= {os.path.normpath(name) for name in pc.struct_field(pictures, "path").to_pylist() if name}
    missing = [file for file in files if os.path.join(path, file) not in named]
    count = f"{len(missing)} of {len(files)} pictures"
    return [f"left out {count}, which no metadata file names: {by_kind(missing, EXAMPLES)}"] if missing else []


def _picture_columns(table: datasets.Dataset) -> list[str]:
    return [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]


def _by_path(dataset: datasets.Dataset) -> datasets.Dataset:
    if "image" not in dataset.column_names:
        return dataset
    order = pc.sort_indices(pc.struct_field(dataset.data.column("image"), "path"))
    return dataset.select(order.to_numpy().astype(np.int64))


def _state(path: str) -> tuple[str, int | None, int | None]:
    """What changes with a file's content, without reading it."""
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and status.st_size, status and status.st_mtime_ns
