"""Selects from an opened source: the split, the image column, and the rows by their labels."""

import re
from dataclasses import dataclass

import datasets
import numpy as np

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError, first_few

LABEL_TYPES = re.compile(r"u?int\d+|bool|(large_)?string(_view)?")
Range = tuple[str, int, int]  # rows of a split: its name, the first, and the one after the last


@dataclass(frozen=True)
class Selection:
    """The selected rows, their pictures not decoded yet."""

    dataset: datasets.Dataset  # its image column holds {"bytes", "path"}
    image_column: str
    rows: np.ndarray  # int64 (n,): the selected rows, in order
    labels: np.ndarray | None  # int64 (n,), -1 for a row that has none
    label_names: list[str] | None  # the name of label k, where labels have names


def select(splits: dict[str, datasets.Dataset], config: DataConfig, split: str, key: str = "data.split") -> Selection:
    """The images of one split that have the labels in the config.

    Args:
        key: where the config names the split.

    Raises:
        UserError: no such split, column or label; one line that lists those that exist.
    """
    dataset = _part(splits, split, key, config.source)
    column = _image_column(dataset, config)
    labels, names = _labels(dataset, config)
    rows = np.arange(len(dataset))
    if config.labels is not None and labels is not None:  # `_labels` raises if labels are chosen and there are none
        rows = np.flatnonzero(np.isin(labels, _wanted(dataset, labels, names, config, split)))
        labels = labels[rows]
    try:
        encoded = dataset.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError):
        found = dataset.features[column]
        raise UserError(f"data.image_column: found {column!r}, which holds {found}; expected pictures") from None
    return Selection(encoded, column, rows, labels, names)


def check_held_out(splits: dict[str, datasets.Dataset], config: DataConfig) -> None:
    """Raises UserError if rows of `data.validation_split` are among those to train on."""
    if config.validation_split is None:
        return
    key = "data.validation_split"
    trained = _ranges(splits, config.split, "data.split", config.source)
    held = _ranges(splits, config.validation_split, key, config.source)
    both = _common(trained, held)
    if both:
        raise UserError(
            f"{key}: found {config.validation_split!r}, which has {both} rows in common with data.split "
            f"{config.split!r}; expected rows that are not trained on"
        )


def _part(splits: dict[str, datasets.Dataset], spec: str, key: str, source: str) -> datasets.Dataset:
    """A split by its name, or part of it in the notation of `datasets`: `train[:1000]`, `train[10%:]`, `train+test`."""
    if spec in splits:
        return splits[spec]
    ranges = [(name, start, stop) for name, start, stop in _ranges(splits, spec, key, source) if start < stop]
    if not ranges:
        raise UserError(f"{key}: found no images in {spec!r} of {source}; expected at least one")
    twice = sum(_common([one], ranges[number:]) for number, one in enumerate(ranges, 1))
    if twice:
        raise UserError(f"{key}: found {spec!r}, which names {twice} rows twice; expected each once")
    return datasets.concatenate_datasets([splits[name].select(range(start, stop)) for name, start, stop in ranges])


def _ranges(splits: dict[str, datasets.Dataset], spec: str, key: str, source: str) -> list[Range]:
    """The rows that a split's name or the notation of `datasets` means."""
    lengths = {name: len(split) for name, split in splits.items()}
    if spec in splits:
        return [(spec, 0, lengths[spec])]
    try:
        pieces = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (AssertionError, ValueError):
        raise UserError(f"{key}: found {spec!r}; expected a split of {source}, which has {', '.join(splits)}") from None
    return [(piece.splitname, *slice(piece.from_, piece.to).indices(lengths[piece.splitname])[:2]) for piece in pieces]


def _common(some: list[Range], others: list[Range]) -> int:
    """How many rows are in both."""
    pairs = ((one, other) for one in some for other in others if one[0] == other[0])
    return sum(max(0, min(one[2], other[2]) - max(one[1], other[1])) for one, other in pairs)


def _image_column(dataset: datasets.Dataset, config: DataConfig) -> str:
    """The configured column. A tar names its columns by extension, so `image` also means the only one with pictures."""
    if config.image_column in dataset.column_names:
        return config.image_column
    pictures: list[str] = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if config.image_column == "image" and len(pictures) == 1:
        return pictures[0]
    raise UserError(_no_column("data.image_column", config.image_column, dataset, config.source))


def _no_column(key: str, found: str, dataset: datasets.Dataset, source: str) -> str:
    return f"{key}: found {found!r}; expected a column of {source}, which has {_columns(dataset)}"


def _columns(dataset: datasets.Dataset) -> str:
    columns = dataset.features.items()
    return ", ".join(f"{name} (pictures)" if isinstance(kind, datasets.Image) else name for name, kind in columns)


def _labels(dataset: datasets.Dataset, config: DataConfig) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels as int64 (n,), and their names: class labels, integers (without names), or a column's distinct texts."""
    column, required = config.label_column or "label", config.label_column or config.labels
    kind = dataset.features.get(column)
    if isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and LABEL_TYPES.match(kind.dtype)):
        values, names = dataset[column][:], getattr(kind, "names", None)
        if names is None and "string" in kind.dtype:
            values = [(value or "").strip() for value in values]  # blanks are no label, nor part of one
            names = sorted({value for value in values if value})
            codes = {name: code for code, name in enumerate(names)}
            values = [codes.get(value) for value in values]
        if (most := max((value for value in values if value is not None), default=0)) >= 2**63:
            raise UserError(f"data.label_column: found {most} in {column!r} of {config.source}; expected below 2^63")
        labels = np.array([-1 if value is None else value for value in values], dtype=np.int64)
        if names is not None and labels.max(initial=-1) >= len(names):
            raise UserError(
                f"data.label_column: found label {labels.max()} in {column!r} of {config.source}; expected one of the "
                f"{len(names)} named classes, 0 to {len(names) - 1}"
            )
        return labels, names
    if kind is None and config.label_column:
        raise UserError(_no_column("data.label_column", column, dataset, config.source))
    if kind is None and config.labels:
        raise UserError(
            f"data.labels: found {list(config.labels)}, but {config.source} has no column {column!r}, only "
            f"{_columns(dataset)}; set data.label_column to the labels, or data.labels=null to train on all images"
        )
    if required:
        raise UserError(
            f"data.label_column: found {column!r}, which holds {kind}; expected class labels, integers or texts"
        )
    return None, None


def _wanted(
    dataset: datasets.Dataset,
    labels: np.ndarray,
    names: list[str] | None,
    config: DataConfig,
    split: str,
) -> list[int]:
    """The stored numbers of the labels to keep. A class is given by its name, or by its number if no name is that."""
    chosen = config.labels or ()
    present = [int(label) for label in np.unique(labels) if label >= 0 or names is None]
    known = {names[label] if names else str(label): label for label in present}
    listed = first_few(known, most=20)
    if isinstance(dataset.features[config.label_column or "label"], datasets.ClassLabel):
        known = {str(label): label for label in present} | known
    if unknown := [label for label in chosen if str(label) not in known]:
        part = config.source if split == "train" else f"{split} of {config.source}"
        raise UserError(f"data.labels: found {unknown}; expected labels of {part}, which has {listed}")
    return [known[str(label)] for label in chosen]
