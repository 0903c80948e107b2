"""Pipelines on disk and on the hub: found, read, exported, uploaded."""

import glob
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import (
    create_repo,
    get_cached_repo_tree,
    hf_hub_download,
    list_repo_files,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from finetune.core.errors import UserError, first_line
from finetune.core.files import permit, writing

_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(\.\w+)??(-\d+-of-\d+)?\.(safetensors|bin)")

DESCRIPTIONS = 2**20  # bytes to allow for the small files of an export: configs, names of classes, the model card
_HEADER = 256  # bytes at most that a safetensors file says of a tensor: name, type, shape and place


def variant(folder: Path) -> str | None:
    """The variant of a component's weights to load: None unless a folder has only variants, such as fp16."""
    return _variant_among(file.name for file in folder.glob("*"))


def _variant_among(names: Iterable[str]) -> str | None:
    found = {(match[2] or "").lstrip(".") for name in names if (match := _WEIGHTS.fullmatch(name))}
    return None if not found or "" in found else min(found)


def is_loaded(name: str, chosen: str | None) -> bool:
    """Whether a file's name is that of weights of the chosen variant."""
    match = _WEIGHTS.fullmatch(name)
    return match is not None and (match[2] or "").lstrip(".") == (chosen or "")


def pipeline_folder(name: str) -> Path:
    """The folder of a pipeline: `name` itself if it is one, else what the hub has under it.

    Raises:
        UserError: if there is no such folder and the download fails.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise UserError(
            f"model.pretrained: found the file {name}; expected the folder of a pipeline (of a checkpoint in one file, "
            "diffusers' from_single_file and save_pretrained make one) or a hub id"
        )
    if name.startswith((".", os.sep)) or name.count("/") > 1:
        raise UserError(f"model.pretrained: found nothing at {name}; expected the folder of a pipeline or a hub id")
    try:
        return Path(snapshot_download(name, allow_patterns=[glob.escape(file) for file in _files_to_load(name)]))
    except UserError:
        raise
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model.pretrained: {name!r} is not a local folder, and the hub cannot be reached; give the folder of a "
            "pipeline, or check the connection"
        ) from error
    except Exception as error:  # the hub's client raises a dozen, from a malformed id to no access
        raise UserError(
            f"model.pretrained: {name!r} is not a local folder, and the download failed ({first_line(error)}); give "
            "the folder of a pipeline or a hub id, check the connection and the login, or set HF_HUB_OFFLINE=1 to use "
            "what was downloaded before"
        ) from error


def _files_to_load(name: str) -> Iterator[str]:
    """Of a pipeline on the hub, the configs, vocabularies and weights of its components; never code.

    (`DiffusionPipeline.download` fetches code where a pipeline names it, and of a repository that has only variants
    fetches no weights at all.)
    """
    index = read_json(Path(hf_hub_download(name, "model_index.json")), name, "the index of a pipeline")
    try:
        files = list_repo_files(name)
    except Exception as error:  # as above; what was downloaded before is there without the hub too
        try:
            files = [file.path for file in get_cached_repo_tree(name)]
        except CachedRepoTreeNotFoundError:
            raise error from None
    by_folder: dict[str, list[str]] = {}
    for file in files:
        by_folder.setdefault(os.path.dirname(file), []).append(os.path.basename(file))
    for folder in by_folder.keys() & {"", *index}:  # the earliest pipelines keep everything at the top
        names = by_folder[folder]
        weights = [file for file in names if is_loaded(file, _variant_among(names))]
        safe = [file for file in weights if file.endswith(".safetensors")]
        described = [file for file in names if file.endswith((".json", ".txt"))]
        yield from (os.path.join(folder, file) for file in (safe or weights) + described)


def read_json(file: Path, name: str, expected: str) -> dict[str, Any]:
    """A JSON file of the pipeline `name`, which has to hold a mapping; `expected` says what it should have been."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.pretrained: {name}: {file.name} cannot be read ({first_line(error)}); expected {expected}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"model.pretrained: {name}: {file.name} holds no mapping; expected {expected}")
    return content


def save_export(save: Callable[[Path], None], folder: Path, card: str, pictures: list[Path]) -> None:
    """Write what a finished run gives to others, with its model card and the card's pictures; atomic.

    Args:
        save: writes a kind of model into a folder, see `core.kind.Kind`; what it raises leaves an old export as it was.
    """
    partial = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            save(partial)
            permit(partial.rglob("*.safetensors"))
            for picture in pictures:
                shutil.copy(picture, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write what `from_pretrained` loads, without paths of this machine."""
    pipeline.save_pretrained(folder)
    _add_pipeline_code(pipeline, folder)
    _forget_origin(folder)


def file_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors take in a file, at most; of a sharded one all of it."""
    return sum(tensor.numel() * tensor.element_size() + _HEADER for tensor in tensors)


def _add_pipeline_code(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Put the class of a pipeline that diffusers does not have beside its weights, as diffusers loads such classes.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` then finds it: model_index.json names the file
    and the class.
    """
    cls = type(pipeline)
    if cls.__module__.startswith("diffusers."):
        return
    shutil.copy(inspect.getfile(cls), folder / "pipeline.py")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = ["pipeline", cls.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _forget_origin(folder: Path) -> None:
    """Remove where each component was loaded from, which diffusers keeps: a path of this machine."""
    for file in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def push(folder: Path, repository: str) -> str:
    """Upload an exported pipeline to a hub repository, created if need be; returns its address.

    Raises:
        UserError: if the upload fails; the folder stays, and the same command tries again.
    """
    try:
        create_repo(repository, exist_ok=True)
        upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Fine-tuned {folder.name}")
    except Exception as error:  # the hub's client raises a dozen, from no login to no route to the host
        raise UserError(
            f"export.push_to_hub: {repository}: the upload of {folder} failed ({first_line(error)}); log in with "
            "`hf auth login`, or set HF_TOKEN, and run the same command again",
            exit_code=1,
        ) from error
    return f"https://huggingface.co/{repository}"
