"""Where images come from: whatever a config may name as `data.source`, opened through `datasets`, nothing decoded yet.

A stranger's folder gets four readers (pictures, parquet, arrow, tar), a stranger's hub repository those that `datasets`
has for data files: no script, no pickle, no code of theirs. A path that stands in a row is only followed into
`Source.folders`.
"""

import errno
import glob
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDER_NAMES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from finetune.errors import UserError

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
    downloads = (HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
    return Source(_build(source), tuple(map(os.path.abspath, downloads)))


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
    """A saved dataset, or files of one kind in and below a folder.

    Splits are told by names, as train/ and test/, if every file has one; else all is `train`. Left to itself,
    `datasets` takes the one `train_station.jpg` among a thousand pictures for the whole split `train`.
    """
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(path)
        return Source(saved if isinstance(saved, dict) else {"train": saved})
    found = _listing(path)
    described = found.pop("metadata", [])
    if len(found) != 1:
        kinds = (
            " and ".join(f"{len(files)} for {reader}" for reader, files in sorted(found.items())) or "nothing to read"
        )
        raise UserError(f"data.source: found {kinds} in the folder {path}, expected files of one kind; {EXPECTED}")
    ((reader, files),) = found.items()
    splits = {file: _split_of(file, reader) for file in sorted(files)}
    if None in splits.values() or any(os.sep not in file for file in described):
        splits = dict.fromkeys(splits, "train")
    if reader == "imagefolder" and not described:
        return Source(_pictures(path, splits), (path,))
    whole = set(splits.values()) == {"train"}
    patterns: dict[str, dict[str, None]] = {}
    for file, split in splits.items():
        within = glob.escape(file)  # a bracket in a name would be part of the pattern
        if reader == "imagefolder":
            within = "**" if whole else os.path.join(file.split(os.sep)[0], "**")
        patterns.setdefault(split, {})[os.path.join(glob.escape(path), within)] = None
    tables = _build(reader, data_files={split: list(globs) for split, globs in patterns.items()})
    if reader != "imagefolder":
        return Source(tables)
    # Several metadata files are read in an order that differs from run to run.
    return Source({split: _by_path(table) for split, table in tables.items()}, (path,))


def _listing(path: str) -> dict[str, list[str]]:
    """Files in and below a folder, by their reader or as `metadata`: relative paths, hidden ones left out."""
    found: dict[str, list[str]] = {}
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            described = name in ImageFolder.METADATA_FILENAMES
            reader = "metadata" if described else READERS.get(os.path.splitext(name)[1].lower())
            if reader and not name.startswith("."):
                found.setdefault(reader, []).append(os.path.relpath(os.path.join(folder, name), path))
    return found


def _split_of(file: str, reader: str) -> str | None:
    """`train` for train/x.jpg, data/train-00000-of-00002.parquet; pictures are told by the topmost folder alone."""
    *folders, name = file.split(os.sep)
    words = folders[:1] if reader == "imagefolder" else [*folders, re.split(r"[^a-zA-Z]", name)[0]]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)


def _by_path(dataset: datasets.Dataset) -> datasets.Dataset:
    if "image" not in dataset.column_names:
        return dataset
    order = pc.sort_indices(pc.struct_field(dataset.data.column("image"), "path"))
    return dataset.select(order.to_numpy().astype(np.int64))


def _pictures(path: str, splits: dict[str, str]) -> dict[str, datasets.Dataset]:
    """What `imagefolder` makes of pictures without metadata: paths, and their folders as labels if all are as deep.

    Itself it would take 0.2 ms a picture, at every start, to see whether any has changed; this takes a tenth of that.
    """
    classes = {file: os.path.basename(os.path.dirname(os.path.join(path, file))) for file in splits}
    label = datasets.ClassLabel(names=sorted(set(classes.values())))
    labelled = label.num_classes > 1 and len({file.count(os.sep) for file in splits}) == 1
    features = datasets.Features({"image": datasets.Image(decode=False)} | ({"label": label} if labelled else {}))
    tables = {}
    for split in sorted(set(splits.values())):
        files = [file for file in splits if splits[file] == split]
        paths = [os.path.join(path, file) for file in files]
        columns = {"image": [{"bytes": None, "path": path} for path in paths]}
        columns["label"] = label.str2int([classes[file] for file in files])
        table = pa.table({name: columns[name] for name in features}, features.arrow_schema)
        identity = repr((features, [_state(path) for path in paths])).encode()
        tables[split] = datasets.Dataset(table, fingerprint=hashlib.blake2b(identity, digest_size=8).hexdigest())
    return tables


def _state(path: str) -> tuple[str, int, int]:
    """What changes with a file's content, as far as can be told without reading it."""
    status = os.stat(path) if os.path.exists(path) else None
    return path, status and status.st_size, status and status.st_mtime_ns
