"""Splits of files, as their names tell: train/cat/1.png, data/train-00000-of-00002.parquet."""

import os
import re
from collections.abc import Iterable, Sequence

from finetune.core.errors import first_few, printable

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SHARD = re.compile(r"(.*?)-?(\d{5,})-of-(\d{5,})")


def splits_of(files: Sequence[str], reader: str, metadata: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split; all are `train` unless every one is in a folder of a split, or has a name like one."""
    if reader == "imagefolder":
        depth = split_depth(files)
        if depth is None or any(file.count(os.sep) <= depth for file in metadata):
            return {"train": [*files]}
        names = [_split_in(_folder(file, depth)) for file in files]
    else:
        names = [_split_of_table(file) for file in files]
    if None in names:
        return {"train": [*files]}
    by_split: dict[str, list[str]] = {}
    for file, name in zip(files, names, strict=True):
        by_split.setdefault(name or "train", []).append(file)
    return by_split


def split_depth(files: Sequence[str]) -> int | None:
    """Which folder of each picture's path names its split: the topmost, or the first below those that all share.

    A folder is named exactly so, or, where `train` is among several, with further words: training_set and test_set.
    """
    shared = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    for depth in (0, len(shared.split(os.sep)) if shared else 0):
        folders = {_folder(file, depth) for file in files}
        if all(folder.lower() in SPLITS for folder in folders):
            return depth
        found = {_split_in(folder) for folder in folders}
        if None not in found and len(found) > 1 and "train" in found:
            return depth
    return None


def split_notes(files: Sequence[str], splits: Iterable[str]) -> list[str]:
    """A line if pictures are all of one split, though they lie in folders that are named after several."""
    if len([*splits]) > 1:
        return []
    folders = {folder for file in files for folder in file.split(os.sep)[:-1] if _split_in(folder)}
    if len({_split_in(folder) for folder in folders}) < 2:
        return []
    named = first_few(map(printable, sorted(folders)))
    return [f"not taken for splits, as not every picture is in one at the same depth: folders named {named}"]


def missing_shards(files: Iterable[str]) -> list[str]:
    """A line for each series of numbered shards that lacks some: train-00000-of-00003 without train-00001-of-00003."""
    series: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if match := SHARD.match(os.path.basename(file)):
            start = os.path.join(os.path.dirname(file), match[1])
            series.setdefault((start, match[3]), set()).add(int(match[2]))
    return [
        f"missing {int(total) - len(numbers)} of {int(total)} shards of {printable(start)}-*-of-{total}"
        for (start, total), numbers in series.items()
        if len(numbers) < int(total)
    ]


def _folder(file: str, depth: int) -> str:
    """The folder at a depth of a picture's path; empty if there is none."""
    folders = file.split(os.sep)[:-1]
    return folders[depth] if depth < len(folders) else ""


def _split_in(folder: str) -> str | None:
    words = re.split(r"[^a-z]+", folder.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _split_of_table(file: str) -> str | None:
    *folders, name = file.split(os.sep)
    words = [*folders, re.split(r"[^a-zA-Z]", name)[0]]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), None)
