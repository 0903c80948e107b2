"""Opens what a config may name as `data.source`, through `datasets`. Nothing is decoded yet.

A folder is untrusted: it is read as pictures, parquet, arrow or tar, and a hub repository by the readers that
`datasets` has for data files. No script, pickle or other code in them is run. Paths in rows are only opened inside
`Source.folders`.
"""

import errno
import glob
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDER_NAMES
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from finetune.core.errors import UserError, first_few, printable
from finetune.data.card import default_configuration
from finetune.data.damage import check_files
from finetune.data.fetching import fetch
from finetune.data.listing import READERS, by_kind, check_output, list_folder
from finetune.data.remote import is_url, list_shards
from finetune.data.splits import missing_shards, split_notes, splits_of
from finetune.data.tables import build, build_described, build_pictures, build_tables, naming

NUMBERS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"
EXPECTED = "expected digits, a folder of pictures, a saved dataset, .parquet, .arrow or .tar files"
EXPECTED += " or a URL to them, or a hub id"


@dataclass(frozen=True)
class Source:
    """An opened source."""

    splits: dict[str, datasets.Dataset]
    folders: tuple[str, ...] = ()  # paths in rows are opened inside them only; embedded bytes are always allowed
    notes: list[str] = field(default_factory=list)  # for the plan: the files that were found and left out

    def describe(self, row: int, image: dict[str, Any] | None) -> str:
        """A row in words: its file, relative to the source's folder, or its number and the name that it gives."""
        name = (image or {}).get("path") or ""
        inside = [folder for folder in self.folders if name.startswith(folder + os.sep)]
        name = os.path.relpath(name, inside[0]) if inside else name
        name = printable(name)
        return name if inside else f"row {row}" + (f" ({name})" if name else "")


def open_source(source: str, output_dir: str | None = None, captioned: bool = False) -> Source:
    """Opens digits, a folder, a saved dataset, files, a URL or a hub id.

    Args:
        output_dir: where the run will write.
        captioned: text files beside pictures will be read.

    Raises:
        UserError: it cannot be opened, or `output_dir` is among its files; one line.
    """
    with explained(source), quiet():  # files that may be thumbnails are compared as pictures
        return _open(source, output_dir, captioned)


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turns errors of `datasets`, the hub and the disk into a UserError of one line."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would also log the errors that it raises
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # one call may raise the errors of a dozen libraries
        if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
            error = error.__cause__
        raise UserError(f"data.source: {source}: {_explanation(error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore PIL's warnings: large pictures that it still allows, odd metadata. Not thread-safe: enter it outside."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def _explanation(error: BaseException) -> str:
    detail = " ".join(str(error).split())[:300] or type(error).__name__
    cache = datasets.config.HF_DATASETS_CACHE
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no room in the datasets cache {cache}: free some space, or set HF_DATASETS_CACHE to a larger disk"
    if isinstance(error, DatasetNotFoundError):
        return f"no such folder or file here, nor on the hub ({detail}); {EXPECTED}"
    if isinstance(error, ConnectionError):
        return f"no such folder or file here, and the hub cannot be reached ({detail}): check the name and the network"
    if isinstance(error, PermissionError) and not str(error.filename).startswith(str(cache)):
        return f"{error.filename} cannot be read ({error.strerror}); change its permissions, or leave it out"
    if isinstance(error, UnicodeEncodeError):  # of an archive's member, as Python holds it
        return f"found the name {os.fsencode(error.object)!r}, expected one in UTF-8; rename it"
    if "Config name is missing" in detail:
        return f"{detail.partition(' Example of usage')[0]}; download the files of one, and set data.source to them"
    return (
        f"{detail} (datasets cache: {cache}, or where HF_DATASETS_CACHE says)" if isinstance(error, OSError) else detail
    )


def _open(source: str, output_dir: str | None, captioned: bool) -> Source:
    path = os.path.abspath(source)
    if source == "digits":
        return Source({"train": _digits()})
    if is_url(source):
        return _open_url(source)
    if os.path.isdir(path):
        return _open_folder(path, output_dir, captioned)
    if files := sorted(filter(os.path.isfile, glob.glob(path, recursive=True))):
        readers = {READERS.get(os.path.splitext(file)[1].lower(), "nothing") for file in files}
        if len(readers) > 1 or not readers <= {"parquet", "arrow", "webdataset"}:
            raise UserError(
                f"data.source: found {source}, files of unsupported or mixed types: {by_kind(files)}; {EXPECTED}"
            )
        return Source(build_tables(readers.pop(), {"train": files}))
    # Given the name of one of its own readers, `datasets` would read the working directory.
    if source in BUILDER_NAMES or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise UserError(f"data.source: found nothing at {path}; {EXPECTED}")
    downloads = (HF_HUB_CACHE, str(datasets.config.HF_DATASETS_CACHE))
    return Source(build(source), tuple(map(os.path.abspath, downloads)))


def _open_url(source: str) -> Source:
    """Parquet, arrow or tar files behind a URL, which the cache gets first."""
    shards, notes = list_shards(source)
    fetch(source, shards)
    paths, reader = {shard.relative: shard.path for shard in shards}, shards[0].reader
    splits = {split: [paths[name] for name in part] for split, part in splits_of([*paths], reader, []).items()}
    counts = ", ".join(f"{len(part)} in {split}" for split, part in splits.items())
    return Source(
        build_tables(reader, splits), notes=[f"found {by_kind(paths)}: {counts}", *missing_shards(paths), *notes]
    )


def _digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, whose values 0 .. 16 become 0 .. 255.

    Each has its label, and a caption such as "a handwritten seven".
    """

    def rows() -> Iterator[dict[str, Any]]:
        from sklearn.datasets import load_digits  # seconds to import: only where the cache has no digits yet

        digits = load_digits()
        for pixels, label in zip(digits.images, digits.target, strict=True):
            file = io.BytesIO()
            Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            caption = f"a handwritten {NUMBERS[label]}"
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": int(label), "caption": caption}

    names, text = datasets.ClassLabel(names=list("0123456789")), datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": names, "caption": text})
    # The fingerprint would otherwise be a hash of the code above, which another Python compiles differently.
    return datasets.Dataset.from_generator(rows, features=features, fingerprint="finetune-digits-2")


def _open_folder(path: str, output_dir: str | None, captioned: bool) -> Source:
    """A saved dataset, or files of one kind in and below a folder.

    The splits are those of the README.md's configuration. Without one they are read from names, as train/ and test/, if
    every file has such a name; else all files are `train`. Left to itself, `datasets` takes the one `train_station.jpg`
    among a thousand pictures for the whole split `train`.
    """
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        return Source(_saved(path))
    if output_dir is not None:
        check_output(path, output_dir)
    listing, options = list_folder(path, output_dir, captioned), default_configuration(path)
    splits = options.files(path, listing.everything)
    if splits is not None:
        listing = listing.restricted_to(splits, f"that the configuration {options.name} of README.md does not name")
    elif options.folder(path) != path:
        path = options.folder(path)
        listing = list_folder(path, output_dir, captioned)
    if len(listing.files) != 1:
        found = " and ".join(by_kind(files) for files in listing.files.values()) or "nothing to read"
        left_out = f" ({'; '.join(listing.notes)})" if listing.notes and not listing.files else ""
        raise UserError(
            f"data.source: found {found} in the folder {path}{left_out}, expected files of one kind; {EXPECTED}"
        )
    ((reader, files),) = listing.files.items()
    noun = ("picture" if reader == "imagefolder" else "file") + "s" * (len(files) != 1)
    by_split = splits_of(files, reader, listing.metadata) if splits is None else _known(splits, set(files))
    counts = (
        "; " + ", ".join(f"{len(part)} in {split}" for split, part in by_split.items()) if len(by_split) > 1 else ""
    )
    about = split_notes(files, by_split) if reader == "imagefolder" else missing_shards(files)
    notes = [f"found {len(files)} {noun}: {by_kind(files)}{counts}", *about, *options.notes(), *listing.notes]
    if reader == "arrow":
        _refuse_saved_inside(path, files)
    if reader != "imagefolder":
        absolute = {split: [os.path.join(path, file) for file in files] for split, files in by_split.items()}
        return Source(build_tables(reader, absolute, options.classes, **options.reading(reader)), notes=notes)
    if not listing.metadata or options.get("drop_metadata"):
        return Source(build_pictures(path, by_split, options.get("drop_labels")), (path,), notes)
    whole = by_split if splits is None else splits
    tables = build_described(path, whole, listing.metadata, splits is not None, options.classes)
    return Source(tables, (path,), notes + naming(path, files, tables))


def _refuse_saved_inside(path: str, files: Iterable[str]) -> None:
    """Raises UserError if arrow files belong to saved datasets in folders below, which would be read as one."""
    folders = sorted({os.path.dirname(file) for file in files})
    saved = [folder for folder in folders if os.path.isfile(os.path.join(path, folder, "state.json"))]
    if saved:
        raise UserError(
            f"data.source: found {len(saved)} saved dataset(s) in folders below {path}: {first_few(saved)}; give "
            "the folder of one, as `save_to_disk` named it"
        )


def _saved(path: str) -> dict[str, datasets.Dataset]:
    files = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    check_files(file for file in files if file.endswith((".arrow", ".json")))
    saved = datasets.load_from_disk(path)
    splits = saved if isinstance(saved, dict) else {"train": saved}
    # A format set before saving would return arrays or tables instead of values.
    return {name: split.with_format(None) if split.format["type"] else split for name, split in splits.items()}


def _known(splits: dict[str, list[str]], known: set[str]) -> dict[str, list[str]]:
    return {split: sorted(found) for split, files in splits.items() if (found := known.intersection(files))}
