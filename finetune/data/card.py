"""The `configs:` of a local dataset's README.md, which `datasets` honours and a copy from the hub has."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from datasets.data_files import DataFilesDict, sanitize_patterns
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData

from finetune.core.errors import UserError

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
        configurations = _configurations(path)
        name = configurations.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"data.source: {path}: the header of README.md cannot be read: {detail}; fix it") from None
    if not configurations:
        return Configuration()
    if name is None:
        listed = "; ".join(f"{name} ({_files(options)})" for name, options in configurations.items())
        raise UserError(
            f"data.source: {path}: found the configurations {listed} in README.md, none of them the default; expected "
            "the files of one: set data.source to them, or mark one with `default: true`"
        )
    return Configuration(name, configurations[name], tuple(other for other in configurations if other != name))


def _configurations(path: str) -> MetadataConfigs:
    card: dict[str, Any] = {}
    readme, plain = (os.path.join(path, name) for name in CARDS)
    if os.path.isfile(readme):
        with open(readme, encoding="utf-8", errors="replace") as file:
            card |= DatasetCard(file.read(), ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    if os.path.isfile(plain):
        with open(plain, encoding="utf-8", errors="replace") as file:
            card |= yaml.safe_load(file) or {}
    return MetadataConfigs.from_dataset_card_data(DatasetCardData(**card))


def _files(options: Mapping[str, Any]) -> str:
    """A configuration's files as its README.md names them."""
    if "data_files" not in options:
        return options.get("data_dir") or "all files"
    patterns = sanitize_patterns(options["data_files"])
    return ", ".join(dict.fromkeys(pattern for listed in patterns.values() for pattern in listed))
