"""The kind of model that a config names: chosen by the class of its pipeline."""

import json
from pathlib import Path
from typing import Any

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.kind import Kind
from finetune.models.components import PIPELINES
from finetune.models.hub import pipeline_folder
from finetune.models.lora_files import DIFFUSERS
from finetune.models.text_to_image import StableDiffusionOutline
from finetune.models.unconditional import UnconditionalOutline


def outline_kind(
    config: ModelConfig, resolution: int | None, crops: bool = False
) -> UnconditionalOutline | StableDiffusionOutline:
    """A model without memory for its weights: what it takes can be told before `load(seed)` allocates it.

    Args:
        resolution: pixels a side to train at; None: what the model was made for.
        crops: random ones are trained, which a model of latents then encodes itself.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    folder = None if config.pretrained is None else pipeline_folder(config.pretrained)
    if folder is not None and (folder / DIFFUSERS).exists() and not (folder / "model_index.json").exists():
        raise UserError(
            f"model.pretrained: {config.pretrained}: found the adapter {DIFFUSERS}; expected the pipeline that it was "
            "trained beside"
        )
    index = {} if folder is None else _index(folder)
    found = index.get("_class_name")
    if folder is not None and str(found) in PIPELINES:
        return StableDiffusionOutline(config, folder, index, resolution, crops)
    if config.lora is not None:
        raise UserError(
            f"model.lora: found it with {config.pretrained}, {f'a {found}' if found else 'which is no pipeline'}; "
            f"expected a {' or a '.join(PIPELINES)}"
        )
    return UnconditionalOutline(config, folder, resolution)


def load_kind(config: ModelConfig, resolution: int | None, seed: int, crops: bool = False) -> Kind:
    """A model with its weights; what it raises are errors of `outline_kind` and of its `load`."""
    return outline_kind(config, resolution, crops).load(seed)


def _index(path: Path) -> dict[str, Any]:
    """model_index.json, empty where it cannot be read: the loader of pixel models says what is wrong with it."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}
