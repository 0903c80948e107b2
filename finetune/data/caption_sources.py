"""Where captions come from: a column, text files beside the pictures, or one caption for all."""

import os
import re
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow.compute as pc

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError, printable
from finetune.data.captions import Captions
from finetune.data.listing import CAPTIONS
from finetune.data.order import Indices
from finetune.data.selection import Selection
from finetune.data.sources import Source

COLUMNS = "caption", "text", "txt", "json.caption", "json.text"  # looked for in this order where none is named
LONGEST = 2**20  # bytes of a file beside a picture
LISTED = 20  # pictures that an error names


def read_captions(source: Source, config: DataConfig, chosen: Selection, rows: Indices) -> tuple[Captions, str]:
    """The captions of some rows of a selection's dataset, and a line for the plan.

    A column is text, or a list of texts; `json.caption` is a key of a column of mappings. Without a column each picture
    has a text file beside it, of the same name with `.txt`, one caption a line.

    Raises:
        UserError: no such column, or one that holds no texts; pictures without a caption, by name.
    """
    if config.caption is not None:
        return Captions.of([[config.caption]] * len(rows)), f"caption: {config.caption!r} for all pictures"
    column = config.caption_column or _found_column(chosen.dataset)
    if column is not None:
        found, origin = _from_column(chosen.dataset, column, rows, config), f"column {column}"
    elif source.folders:
        found, origin = _from_files(source, chosen, rows), "the files beside the pictures"
    else:
        raise UserError(
            f"data.caption_column: found no column of captions in {config.source}, which has "
            f"{', '.join(chosen.dataset.column_names)}; set it, or data.caption for one caption for all"
        )
    missing = [row for row, texts in zip(rows.tolist(), found, strict=True) if not texts]
    if missing:
        names = [source.describe(row, chosen.dataset[row][chosen.image_column]) for row in missing[:LISTED]]
        raise UserError(
            f"data.caption_column: found no caption in {origin} for {len(missing)} of {len(rows)} pictures; expected "
            "one for each: add them, remove the pictures, or set data.caption for one caption for all",
            *names,
            *([f"and {len(missing) - LISTED} more"] if len(missing) > LISTED else []),
        )
    captions = Captions.of(found)
    most = max(map(len, found))
    several = f", up to {most} a picture" if most > 1 else ""
    return captions, f"captions: {len(captions.texts)} different ones from {origin}{several}"


def _found_column(dataset: datasets.Dataset) -> str | None:
    return next((column for column in COLUMNS if _holds_texts(dataset, column)), None)


def _holds_texts(dataset: datasets.Dataset, column: str) -> bool:
    kind = _kind(dataset, column)
    kind = getattr(kind, "feature", kind)  # of a list
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string", "string_view")


def _kind(dataset: datasets.Dataset, column: str) -> Any:
    """What a column or a key of a column of mappings holds; None if there is none."""
    if column in dataset.features:
        return dataset.features[column]
    root, _, key = column.partition(".")
    keys = dataset.features.get(root)
    return keys.get(key) if isinstance(keys, dict) else None


def _from_column(dataset: datasets.Dataset, column: str, rows: Indices, config: DataConfig) -> list[list[str]]:
    if not _holds_texts(dataset, column):
        kind = _kind(dataset, column)
        found = f"found {column!r}" + (f", which holds {kind}" if kind is not None else "")
        raise UserError(
            f"data.caption_column: {found}; expected a column of texts or of lists of texts of {config.source}, which "
            f"has {', '.join(dataset.column_names)}"
        )
    root, _, key = (column, "", "") if column in dataset.features else column.partition(".")
    values: list[Any] = dataset.select(rows).select_columns(root)[root][:]
    if key:
        values = [(value or {}).get(key) for value in values]
    return [_cleaned([value] if isinstance(value, str) else value or ()) for value in values]


def _from_files(source: Source, chosen: Selection, rows: Indices) -> list[list[str]]:
    pictures = chosen.dataset.select(rows).select_columns(chosen.image_column).with_format("arrow")[:]
    paths = pc.struct_field(pictures.column(chosen.image_column), "path").to_pylist()
    return [_from_file(path, source.folders) for path in paths]


def _from_file(picture: str | None, folders: Sequence[str]) -> list[str]:
    """The lines of the text file beside a picture; none if there is no such file."""
    if not picture or not any(os.path.abspath(picture).startswith(folder + os.sep) for folder in folders):
        return []
    files = [os.path.splitext(picture)[0] + extension for extension in CAPTIONS]
    file = next(filter(os.path.isfile, files), None)  # reading a named pipe would wait for ever
    if file is None:
        return []
    try:
        with open(file, "rb") as opened:
            content = opened.read(LONGEST + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise _unusable(file, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise _unusable(file, f"has a byte at {error.start} that is not UTF-8: save the file as UTF-8") from None
    if len(content) > LONGEST:
        raise _unusable(file, f"has more than {LONGEST:,} bytes; expected captions, one a line")
    if "\0" in text:  # of UTF-16 without a byte order mark every second byte is one
        raise _unusable(file, f"has a zero byte at {content.index(0)}, which no text in UTF-8 has: save it as UTF-8")
    return _cleaned(re.split(r"\r\n?|\n", text))  # not `splitlines`, which also cuts at what is pasted from the web


def _unusable(file: str, problem: str) -> UserError:
    return UserError(f"data.caption_column: {printable(file)} {problem}")


def _cleaned(texts: Sequence[str | None]) -> list[str]:
    """Texts with words in them, on one line each and without blanks around them; twice the same counts once."""
    lines = [" ".join(text.split()) for text in texts if text is not None]
    return list(dict.fromkeys(line for line in lines if line))
