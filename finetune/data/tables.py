"""Files as datasets: tables from parquet, arrow and tar files, and pictures with or without metadata files."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import table_cast

from finetune.core.errors import UserError, first_few
from finetune.data.archives import check_archives
from finetune.data.damage import broken_table, check_files, check_metadata
from finetune.data.listing import by_kind
from finetune.data.metadata import read_metadata
from finetune.data.schemas import check_schemas, named_classes, with_classes, with_rows
from finetune.data.splits import split_depth

Classes = Mapping[str, datasets.ClassLabel]


def build(name: str, **options: Any) -> dict[str, datasets.Dataset]:
    """The splits of what `datasets.load_dataset` would load.

    If a hub's README.md declares columns of classes and none of pictures, it would read only those that are declared.
    """
    builder = datasets.load_dataset_builder(name, **options)
    described = builder.info.features or {}
    classes = {column: kind for column, kind in described.items() if isinstance(kind, datasets.ClassLabel)}
    is_partial = bool(classes) and not any(isinstance(kind, datasets.Image) for kind in described.values())
    if is_partial:
        builder.info.features = None
    if builder.name == "webdataset":
        splits_of_archives = [*_archives(builder).values()]
        # `datasets` takes the columns from the last split.
        check_archives([file for files in splits_of_archives for file in files], first=splits_of_archives[-1][0])
    builder.download_and_prepare()
    splits: dict[str, datasets.Dataset] = builder.as_dataset()
    return {split: named_classes(table, classes, name) for split, table in splits.items()} if is_partial else splits


def _archives(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """The tar files of a builder by split, on this machine: those of a hub are downloaded, once."""
    options = datasets.DownloadConfig(cache_dir=builder._cache_downloaded_dir, use_etag=False, token=builder.token)
    manager = datasets.DownloadManager(dataset_name=builder.dataset_name, download_config=options)
    files: dict[str, list[str]] = manager.download(builder.config.data_files)
    return files


def build_tables(
    reader: str, files: dict[str, list[str]], classes: Classes | None = None, **options: Any
) -> dict[str, datasets.Dataset]:
    """Tables from the paths of parquet, arrow or tar files, by split.

    Args:
        classes: by column, classes that the files themselves do not name.
    """
    check_files(file for split in files.values() for file in split)
    if reader == "parquet":
        files = with_rows(files)
    paths = [file for split in files.values() for file in split]
    patterns = {split: [glob.escape(file) for file in paths] for split, paths in files.items()}
    try:
        if reader in ("parquet", "arrow"):
            check_schemas(paths)
            if classes and "features" not in options and (features := with_classes(paths[0], classes)):
                names = options.get("columns") or features
                options["features"] = datasets.Features({name: features[name] for name in names})
        tables = build(reader, data_files=patterns, **options)
        if reader == "webdataset" and classes:
            where = first_few(map(os.path.basename, paths))
            tables = {split: named_classes(table, classes, where) for split, table in tables.items()}
        return tables
    except UserError:
        raise
    except Exception:
        if problem := broken_table(reader, paths):
            raise UserError(f"data.source: {problem}") from None
        raise


def build_pictures(path: str, splits: dict[str, list[str]], drop_labels: bool | None) -> dict[str, datasets.Dataset]:
    """What `imagefolder` makes of pictures without metadata: paths, and their folders as labels if all are as deep.

    Folders of splits are no labels.

    It would itself take 0.2 ms a picture, at every start, to see whether any has changed; this takes a tenth of that.

    Args:
        drop_labels: whether to leave labels out; None decides by the folders.
    """
    everything = [file for files in splits.values() for file in files]
    classes = {file: os.path.basename(os.path.dirname(os.path.join(path, file))) for file in everything}
    label = datasets.ClassLabel(names=sorted(set(classes.values())))
    depths, depth = {file.count(os.sep) for file in classes}, split_depth(everything)
    is_split = depth is not None and depths == {depth + 1}  # the folder that a picture lies in
    labelled = label.num_classes > 1 and len(depths) == 1 and not is_split
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
    path: str, splits: dict[str, list[str]], metadata: list[str], explicit: bool, classes: Classes
) -> dict[str, datasets.Dataset]:
    """Pictures with the columns of metadata files, sorted by path; a split without metadata is left out.

    Args:
        explicit: whether a configuration names the files of each split, and the metadata files among them.
        classes: by column, classes that README.md names.
    """
    for file in metadata:
        check_metadata(os.path.join(path, file))
    tables = {}
    depth = split_depth([file for files in splits.values() for file in files]) or 0
    for split, files in splits.items():
        folders = {(*file.split(os.sep)[: depth + 1],) for file in files}
        if explicit:
            described = [file for file in metadata if file in files]
        else:
            described = [
                file for file in metadata if len(splits) == 1 or (*file.split(os.sep)[: depth + 1],) in folders
            ]
        if described:
            tables[split] = _described(path, described, classes)
    return tables


def _described(path: str, metadata: list[str], classes: Classes) -> datasets.Dataset:
    table, pictures = read_metadata(path, metadata)
    features = datasets.Features.from_arrow_schema(table.schema)
    features |= {name: datasets.Image(decode=False) for name in pictures}
    features = datasets.Features(features)
    states = [
        _state(name) for column in pictures for name in pc.struct_field(table[column], "path").to_pylist() if name
    ]
    identity = hashlib.blake2b(repr((features, states)).encode(), digest_size=8)
    for file in metadata:
        with open(os.path.join(path, file), "rb") as opened:
            identity.update(opened.read())
    read = datasets.Dataset(table_cast(table, features.arrow_schema), fingerprint=identity.hexdigest())
    return named_classes(read, classes, first_few(metadata))


def naming(path: str, files: list[str], tables: dict[str, datasets.Dataset]) -> list[str]:
    """Notes on pictures that no row of the metadata names, or several rows of a split."""
    named: set[str] = set()
    twice: set[str] = set()
    for table in tables.values():
        for column in _picture_columns(table):
            paths = pc.struct_field(table.data.column(column), "path").to_pylist()
            names = Counter(os.path.relpath(name, path) for name in paths if name)
            twice |= {name for name, count in names.items() if count > 1}
            named |= names.keys()
    missing = [file for file in files if file not in named]
    notes = []
    if missing:
        count = f"{len(missing)} of {len(files)} pictures"
        notes.append(f"left out {count}, which no metadata file names: {by_kind(missing, named=True)}")
    if twice:
        notes.append(f"named by several rows, each of which is an image: {by_kind(twice, named=True)}")
    return notes


def _picture_columns(table: datasets.Dataset) -> list[str]:
    return [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]


def _state(path: str) -> tuple[str, int | None, int | None]:
    """What changes with a file's content, without reading it."""
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and status.st_size, status and status.st_mtime_ns
