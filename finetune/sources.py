"""Where images come from: whatever a config may name as `data.source`, opened through `datasets`, nothing decoded yet.

A stranger's folder gets four readers (pictures, parquet, arrow, tar), a stranger's hub repository those that `datasets`
has for data files: no script, no pickle, no code of theirs. A path that stands in a row is only followed into
`Source.folders`.
"""

import errno
import glob
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDER_NAMES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from finetune.config import UserError

READERS = dict.fromkeys(ImageFolder.EXTENSIONS, "imagefolder")
READERS |= {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
EXPECTED = "expected digits, a folder of pictures, a saved dataset, .parquet, .arrow or .tar files, or a hub id"


@dataclass(frozen=True)
class Source:
    """An opened source: its splits, and where paths in its rows may lead. Bytes in rows need no permission."""

    splits: dict[str, datasets.Dataset]
    folders: tuple[str, ...] = ()

    def describe(self, row: int, image: dict | None) -> str:
        """How a person finds a row: its file within the source's folder, or its number and the name it carries."""
        name = (image or {}).get("path") or ""
        inside = [folder for folder in self.folders if name.startswith(folder + os.sep)]
        name = os.path.relpath(name, inside[0]) if inside else name
        name = name if name.isprintable() else repr(name)
        return name if inside else f"row {row}" + (f" ({name})" if name else "")


def open_source(source: str) -> Source:
    """Opens digits, a folder, a saved dataset, files or a hub id. Raises UserError, one line."""
    with explained(source):
        return _open(source)


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turns what goes wrong inside `datasets`, on the hub or on the disk into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a dozen libraries stand behind one call, each with errors of its own
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__
        raise UserError(f"data.source: {source}: {_explanation(error)}") from error


def _explanation(error: BaseException) -> str:
    detail = " ".join(str(error).split())[:300] or type(error).__name__
    cache = datasets.config.HF_DATASETS_CACHE
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no room in the datasets cache {cache}: free some, or set HF_DATASETS_CACHE to a larger disk"
    if isinstance(error, DatasetNotFoundError):
        return f"no such folder or file here, nor on the hub ({detail}); {EXPECTED}"
    if isinstance(error, ConnectionError):
        return f"no such folder or file here, and the hub cannot be reached ({detail}): check the name and the network"
    return (
        f"{detail} (datasets cache: {cache}, or where HF_DATASETS_CACHE says)" if isinstance(error, OSError) else detail
    )


def _open(source: str) -> Source:
    path = os.path.abspath(os.path.expanduser(source))
    if source == "digits":
        return Source({"train": _digits()})
    if os.path.isdir(path):
        return _open_folder(path)
    if files := sorted(filter(os.path.isfile, glob.glob(path, recursive=True))):
        readers = {READERS.get(os.path.splitext(file)[1].lower(), "nothing") for file in files}
        if len(readers) > 1 or not readers <= {"parquet", "arrow", "webdataset"}:
            raise UserError(f"data.source: found {source}, {len(files)} files that no one reader reads; {EXPECTED}")
        return Source(_build(readers.pop(), data_files={"train": [glob.escape(file) for file in files]}))
    # A reader's own name would make `datasets` read the working directory.
    if source in BUILDER_NAMES or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"data.source: found nothing at {path}; {EXPECTED}")
    return Source(_build(source), (HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE)))


def _build(name: str, **options) -> dict[str, datasets.Dataset]:
    builder = datasets.load_dataset_builder(name, **options)
    builder.download_and_prepare()
    return builder.as_dataset()


def _digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, whose values 0 .. 16 become 0 .. 255."""

    def rows() -> Iterator[dict]:
        from sklearn.datasets import load_digits  # seconds to import: only where the cache has no digits yet

        digits = load_digits()
        for pixels, label in zip(digits.images, digits.target, strict=True):
            file = io.BytesIO()
            Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": int(label)}

    names = datasets.ClassLabel(names=list("0123456789"))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names})
    # The fingerprint would otherwise be a hash of the code above, which another Python compiles differently.
    return datasets.Dataset.from_generator(rows, features=features, fingerprint="finetune-digits-1")


def _open_folder(path: str) -> Source:
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(path)
        return Source(saved if isinstance(saved, dict) else {"train": saved})
    reader, files = _listing(path)
    splits = _build(reader, data_files=_patterns(path, reader, files))
    if reader != "imagefolder":
        return Source(splits)
    # Several metadata files in one folder are read in an order that differs from run to run.
    return Source({name: _by_path(split) for name, split in splits.items()}, (path,))


def _by_path(dataset: datasets.Dataset) -> datasets.Dataset:
    if "image" not in dataset.column_names:
        return dataset
    order = pc.sort_indices(pc.struct_field(dataset.data.column("image"), "path"))
    return dataset.select(order.to_numpy().astype(np.int64))


def _listing(path: str) -> tuple[str, list[str]]:
    """The reader for a folder, and the files in and below it that it reads (relative paths, hidden ones left out)."""
    found: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            reader = READERS.get(os.path.splitext(name)[1].lower())
            if reader and not name.startswith(".") and name not in ImageFolder.METADATA_FILENAMES:
                found.setdefault(reader, []).append(os.path.relpath(os.path.join(folder, name), path))
    if not found:
        raise UserError(f"data.source: found no pictures and no data files in the folder {path}; {EXPECTED}")
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} for {reader}" for reader, files in sorted(found.items()))
        raise UserError(f"data.source: found files for several readers in {path}, {counts}; expected one kind")
    return found.popitem()


def _patterns(path: str, reader: str, files: list[str]) -> dict[str, list[str]]:
    """Globs for each split. Splits are told by names, as train/ and test/, if every file has one; else all is `train`.

    Left to itself, `datasets` takes the one `train_station.jpg` among a thousand pictures for the whole split `train`,
    and finds nothing in a folder whose name holds a bracket.
    """
    splits = {file: _split_of(file, reader) for file in files}
    described = any(os.path.exists(os.path.join(path, name)) for name in ImageFolder.METADATA_FILENAMES)
    whole = described or None in splits.values()
    patterns: dict[str, set[str]] = {}
    for file, split in splits.items():
        within = glob.escape(file)
        if reader == "imagefolder":
            within = "**" if whole else os.path.join(file.split(os.sep)[0], "**")
        patterns.setdefault("train" if whole else split, set()).add(os.path.join(glob.escape(path), within))
    return {split: sorted(globs) for split, globs in patterns.items()}


def _split_of(file: str, reader: str) -> str | None:
    """`train` for train/x.jpg, data/train-00000-of-00002.parquet; pictures are told by the topmost folder alone."""
    *folders, name = file.split(os.sep)
    words = folders[:1] if reader == "imagefolder" else [*folders, re.split(r"[^a-zA-Z]", name)[0]]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)
