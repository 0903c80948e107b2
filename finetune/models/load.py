"""The kind of model that a config names: chosen by the class of its pipeline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel

from finetune.config.schema import ModelConfig
from finetune.core.errors import UserError
from finetune.core.kind import Kind
from finetune.models.components import PIPELINES, Folder
from finetune.models.hub import pipeline_folder
from finetune.models.lora import DTYPES, outline_adapters
from finetune.models.text_to_image import load_stable_diffusion
from finetune.models.unconditional import load_unconditional, outline_unconditional
from finetune.models.unet import outline


def outline_network(config: ModelConfig, resolution: int | None) -> ModelMixin:
    """The network that `load_kind` loads, on the meta device: its shapes, without memory for weights.

    Args:
        resolution: pixels a side to train at; None: what the model was made for.

    Raises:
        UserError: if there is no such network.
    """
    if config.pretrained is not None:
        path = pipeline_folder(config.pretrained)
        index = _index(path)
        if str(index.get("_class_name")) in PIPELINES:
            folder = Folder(path, config.pretrained, index)
            where = f"model.pretrained: {path / 'unet/config.json'}"
            network = outline(UNet2DConditionModel, folder.config("unet"), where)
            if config.lora is not None:
                torch.nn.Module.to(network, DTYPES[config.lora.base_dtype])  # diffusers' own `to` warns
                outline_adapters(network, config.lora)
            return network
    return outline_unconditional(config, resolution).network


def load_kind(config: ModelConfig, resolution: int | None, seed: int) -> Kind:
    """Load a pretrained model, or build one with initial weights that the seed decides.

    Args:
        resolution: pixels a side to train at; None: what the model was made for.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    if config.pretrained is not None:
        path = pipeline_folder(config.pretrained)
        index = _index(path)
        if str(index.get("_class_name")) in PIPELINES:
            return load_stable_diffusion(config, path, index, resolution, seed)
    if config.lora is not None:
        raise UserError(
            f"model.lora: found it with {config.pretrained}, a model of pixels; expected a StableDiffusionPipeline "
            "or a StableDiffusionXLPipeline"
        )
    return load_unconditional(config, resolution, seed)


def _index(path: Path) -> dict[str, Any]:
    """model_index.json, empty where it cannot be read: the loader of pixel models says what is wrong with it."""
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}
