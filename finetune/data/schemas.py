"""Files that are read as one table: whether their columns mean the same, and the classes that a README.md names."""

import hashlib
import os
from collections.abc import Callable, Mapping
from itertools import takewhile

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from finetune.core.errors import UserError, first_few, first_line

TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "integers": pa.types.is_integer,
    "texts": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "true or false": pa.types.is_boolean,
}
NOTHING = "missing values alone"


def with_rows(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """The parquet files of each split that have rows; `datasets` cannot read one without.

    Raises:
        UserError: none has any, or one is damaged.
    """
    kept = {split: [file for file in paths if _rows(file)] for split, paths in files.items()}
    if not any(kept.values()):
        paths = [file for split in files.values() for file in split]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise UserError(f"data.source: found no rows in {paths[0]}{more}; expected one for each picture")
    return {split: paths for split, paths in kept.items() if paths}


def check_schemas(files: list[str]) -> None:
    """Raises UserError if files call different things by one name: types of values, or classes in another order."""
    found: dict[str, tuple[str, list[str], str]] = {}  # of each column: what it means, its classes, the file
    seen: set[str] = set()
    for file in files:
        schema = _schema(file)
        for field in schema:
            meaning = next((name for name, is_it in TYPES.items() if is_it(field.type)), None)
            feature = datasets.Features.from_arrow_schema(schema)[field.name]
            names: list[str] = feature.names if isinstance(feature, datasets.ClassLabel) else []
            if names:
                meaning = "the classes "
            # `datasets` takes the first file's type for all, and a null column cannot be cast to or from it.
            if pa.types.is_null(field.type) and field.name not in seen:
                meaning = NOTHING
            elif field.name in found and found[field.name][0] == NOTHING and not pa.types.is_null(field.type):
                meaning = meaning or f"values of type {field.type}"
            seen.add(field.name)
            if meaning is None:
                continue
            known, others, other = found.setdefault(field.name, (meaning, names, file))
            if (known, others) != (meaning, names):
                here, there = f"{meaning}{_differing(names, others)}", f"{known}{_differing(others, names)}"
                raise UserError(
                    f"data.source: found {here} in {field.name!r} of {os.path.basename(file)} and {there} in that "
                    f"of {os.path.basename(other)}; expected the same in all files: convert them, or give one of them"
                )


def _differing(names: list[str], others: list[str]) -> str:
    """The first 20 classes, or those from where a longer list begins to differ from another one."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(names, others, strict=False)))
    return f"..., {first_few(names[same:], 20) or 'no more'}" if same >= 20 else first_few(names, 20)


def with_classes(file: str, classes: Mapping[str, datasets.ClassLabel]) -> datasets.Features | None:
    """A file's features with classes for its columns of integers or texts; None if it has no such column."""
    features = datasets.Features.from_arrow_schema(_schema(file))
    new = {name: label for name, label in classes.items() if name in features and features[name] != label}
    for name, label in new.items():
        if isinstance(features[name], datasets.ClassLabel):
            raise UserError(
                f"data.source: found the classes {_differing(features[name].names, label.names)} in {name!r} of {file} "
                f"and {_differing(label.names, features[name].names)} in README.md; expected the same: correct one of "
                "them"
            )
    return datasets.Features({**features, **new}) if new else None


def named_classes(table: datasets.Dataset, classes: Mapping[str, datasets.ClassLabel], where: str) -> datasets.Dataset:
    """A dataset with classes for its columns of integers or texts; nothing of its other columns is copied.

    Args:
        where: the files that it was read from, for the error.

    Raises:
        UserError: a value is none of the classes.
    """
    data, features = table.data.table, datasets.Features(table.features)
    for name, label in classes.items():
        kind = features.get(name)
        if not isinstance(kind, datasets.Value) or not any(is_it(kind.pa_type) for is_it in TYPES.values()):
            continue
        values, count = data.column(name).combine_chunks(), len(label.names)
        if TYPES["texts"](kind.pa_type):
            rows = pc.index_in(values, value_set=pa.array(label.names, kind.pa_type)).cast(pa.int64())
            unknown = values.filter(pc.and_(values.is_valid(), rows.is_null()))
        else:
            rows = values.cast(pa.int64())
            unknown = rows.filter(pc.or_(pc.less(rows, -1), pc.greater_equal(rows, count)))  # -1: no label
        if len(unknown):
            raise UserError(
                f"data.source: found {unknown[0].as_py()!r} in {name!r} of {where}; expected one of the "
                f"{count} classes that README.md names: {first_few(label.names, 20)}"
            )
        data = data.set_column(data.column_names.index(name), pa.field(name, pa.int64()), rows)
        features[name] = label
    if features == table.features:
        return table
    identity = hashlib.blake2b(repr((table._fingerprint, features)).encode(), digest_size=8)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(data, info, table.split, fingerprint=identity.hexdigest())


def _rows(file: str) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.source: {file} is damaged or of another type: {first_line(error)}") from None


def _schema(file: str) -> pa.Schema:
    if file.lower().endswith(".parquet"):
        return pq.read_schema(file)
    with pa.memory_map(file) as source:
        try:
            return pa.ipc.open_stream(source).schema
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_file(source).schema
