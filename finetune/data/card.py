"""What a local dataset's README.md says, as `datasets` reads it: the files in `configs:`, and the names of classes."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import yaml
from datasets.data_files import DataFilesDict, sanitize_patterns
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from finetune.core.errors import UserError

INFOS = "dataset_infos.json"  # where earlier versions of `datasets` wrote the class names
CARDS = "README.md", ".huggingface.yaml"  # where both have a key, the second counts
DROPS = "drop_labels", "drop_metadata"  # options of picture folders
READING = {"parquet": ("columns", "features"), "arrow": ("features",), "webdataset": ("features",)}
KNOWN = {"data_files", "data_dir", "default", "version", "description", "columns", "features", *DROPS}


@dataclass(frozen=True)
class Configuration:
    """A named choice of files, and how they are read."""

    name: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()  # the names of the configurations that are not used
    classes: Mapping[str, datasets.ClassLabel] = field(default_factory=dict)  # by column, those that the README names

    def get(self, option: str) -> Any:
        """An option's value, None where it is not set."""
        return self.options.get(option)

    def folder(self, path: str) -> str:
        """The folder that its files lie in."""
        folder = os.path.normpath(os.path.join(path, self.options.get("data_dir") or ""))
        if os.path.relpath(folder, path).split(os.sep)[0] == os.pardir:
            raise UserError(
                f"data.source: {path}: found data_dir {folder} in README.md; expected one inside the folder"
            )
        return folder

    def files(self, path: str, readable: Collection[str]) -> dict[str, list[str]] | None:
        """By split, those of the readable files that it names, relative to `path`; None if it names none."""
        if "data_files" not in self.options:
            return None
        patterns = sanitize_patterns(self.options["data_files"])
        splits: dict[str, list[str]] = {}
        for split, files in DataFilesDict.from_patterns(patterns, base_path=self.folder(path)).items():
            inside = [os.path.relpath(file, path) for file in files]
            outside = [file for file in inside if "://" in file or file.split(os.sep)[0] == os.pardir]
            if outside:
                raise UserError(
                    f"data.source: {path}: found {outside[0]!r} in the configuration {self.name} of README.md; "
                    "expected files inside the folder"
                )
            splits[str(split)] = [file for file in inside if file in readable]
        return splits

    def reading(self, reader: str) -> dict[str, Any]:
        """The options of a reader that it sets."""
        return {name: self.options[name] for name in READING.get(reader, ()) if name in self.options}

    def notes(self) -> list[str]:
        """What is not used of the README.md."""
        notes = []
        if self.others:
            notes.append(f"README.md: configuration {self.name} is used, left out {', '.join(self.others)}")
        if ignored := sorted(self.options.keys() - KNOWN):
            notes.append(f"README.md: options of configuration {self.name} that are ignored: {', '.join(ignored)}")
        return notes


def default_configuration(path: str) -> Configuration:
    """The configuration that `datasets.load_dataset` would choose; one without options where README.md has none.

    Raises:
        UserError: there are several and none is the default.
    """
    try:
        card = _card(path)
        configurations = MetadataConfigs.from_dataset_card_data(card)
        name = configurations.get_default_config_name()
        classes = _classes(path, card, name or "default")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"data.source: {path}: the header of README.md cannot be read: {detail}; fix it") from None
    if not configurations:
        return Configuration(classes=classes)
    if name is None:
        listed = "; ".join(f"{name} ({_files(options)})" for name, options in configurations.items())
        raise UserError(
            f"data.source: {path}: found the configurations {listed} in README.md, none of them the default; expected "
            "the files of one: set data.source to them, or mark one with `default: true`"
        )
    others = tuple(other for other in configurations if other != name)
    return Configuration(name, configurations[name], others, classes)


def _card(path: str) -> DatasetCardData:
    card: dict[str, Any] = {}
    readme, plain = (os.path.join(path, name) for name in CARDS)
    if os.path.isfile(readme):
        with open(readme, encoding="utf-8", errors="replace") as file:
            card |= DatasetCard(file.read(), ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    if os.path.isfile(plain):
        with open(plain, encoding="utf-8", errors="replace") as file:
            card |= yaml.safe_load(file) or {}
    return DatasetCardData(**card)


def _classes(path: str, card: DatasetCardData, name: str) -> dict[str, datasets.ClassLabel]:
    """The classes that `dataset_info` names, by column."""
    infos: Mapping[str, DatasetInfo] = DatasetInfosDict.from_dataset_card_data(card)
    older = os.path.join(path, INFOS)
    if not infos and os.path.isfile(older):
        with open(older, encoding="utf-8") as file:
            infos = {name: DatasetInfo.from_dict(info) for name, info in json.load(file).items()}
    info = infos.get(name) or (next(iter(infos.values())) if len(infos) == 1 else None)
    features = (info and info.features) or {}
    return {column: kind for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}


def _files(options: Mapping[str, Any]) -> str:
    """A configuration's files as its README.md names them."""
    if "data_files" not in options:
        return options.get("data_dir") or "all files"
    patterns = sanitize_patterns(options["data_files"])
    return ", ".join(dict.fromkeys(pattern for listed in patterns.values() for pattern in listed))
