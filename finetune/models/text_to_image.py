"""Text-to-image pipelines: loaded from a folder, and checked before they are trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from finetune.config.schema import ModelConfig
from finetune.core.errors import UserError
from finetune.models.checks import check_finite, check_forward
from finetune.models.components import Folder
from finetune.models.encoders import PipelineEncoders
from finetune.models.lora import DTYPES, LoRA
from finetune.models.noise_schedulers import build_noise_scheduler, check_scheduler
from finetune.models.stable_diffusion import StableDiffusion
from finetune.models.unet import own_resolution


def load_stable_diffusion(
    config: ModelConfig, path: Path, index: dict[str, Any], resolution: int | None, seed: int
) -> StableDiffusion:
    """Load the UNet of a pipeline, and what is known of its encoders; with `config.lora` the seed draws adapters.

    Args:
        path: the pipeline's folder.
        index: its model_index.json.
        resolution: pixels a side to train at; None: what the model was made for.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    name = str(config.pretrained)
    if config.class_conditional:
        raise UserError(
            f"model.class_conditional: found true with {name}, a {index['_class_name']}, which is told captions; "
            "expected false"
        )
    folder = Folder(path, name, index)
    settings = folder.config("scheduler", "scheduler_config.json")
    library, scheduler, *_ = map(str, [*(index.get("scheduler") or ()), "", ""])
    check_scheduler(name, library, scheduler, settings)
    # Latents are not bounded; DDPM's default is to clip, where a scheduler of another class says nothing of it.
    noise_scheduler = build_noise_scheduler(settings | {"clip_sample": False}, config.noise_scheduler)
    vae = folder.config("vae")
    lora = config.lora
    half = lora is not None and lora.base_dtype != "float32"
    network = folder.load("unet", DTYPES[lora.base_dtype] if lora and half else torch.get_default_dtype())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = own_resolution(network.config.sample_size)
    made_for = side and side * factor
    resolution = _checked_resolution(resolution or made_for, factor, network)
    network.register_to_config(sample_size=resolution // factor)
    encoders = PipelineEncoders(folder, resolution)
    encoders.check()
    _check_unet(network, encoders, folder)
    network.requires_grad_(True).train()  # of LoRA, the adapters alone
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    parts = folder, network, noise_scheduler, encoders, made_for, resolution
    kind = StableDiffusion(*parts) if lora is None else LoRA(lora, seed, *parts)
    _check_network(kind)
    return kind


def _checked_resolution(resolution: int | None, factor: int, network: UNet2DConditionModel) -> int:
    if resolution is None:
        raise UserError("data.resolution: not given, and the model has no square sample_size to take it from")
    halvings = len(network.config.block_out_channels) - 1
    multiple = factor * 2**halvings
    if resolution % multiple:
        nearest = max(round(resolution / multiple), 1) * multiple
        raise UserError(
            f"data.resolution: found {resolution}; expected a multiple of {multiple}, since the VAE makes one latent "
            f"of {factor} pixels a side, and the UNet halves latents {halvings} times "
            f"(nearest: {nearest})"
        )
    return resolution


def _check_unet(network: UNet2DConditionModel, encoders: PipelineEncoders, folder: Folder) -> None:
    """Raises UserError for UNets of other tasks: inpainting, depth, instructions, distilled guidance, refiners."""
    config, channels = network.config, encoders.shape[0]
    expected: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "class_embed_type": None,
        "num_class_embeds": None,
        "time_cond_proj_dim": None,
        "encoder_hid_dim_type": None,
        "addition_embed_type": "text_time" if encoders.sized else None,
    }
    for key, value in expected.items():
        if config[key] != value:
            raise UserError(
                f"model.pretrained: {folder.name}: found a UNet with {key} {config[key]!r}; expected {value!r}, as a "
                f"{folder.pipeline_class.__name__} that draws from text alone has with its VAE"
            )
    width, widths = encoders.text_fields["text"][1], config.cross_attention_dim
    if {*(widths if isinstance(widths, list | tuple) else [widths])} != {width}:
        raise UserError(
            f"model.pretrained: {folder.name}: found a UNet with cross_attention_dim {widths}; expected {width}, the "
            "width of what the text encoders make"
        )


def _check_network(kind: StableDiffusion) -> None:
    size = kind.image_format.resolution
    problem = f"model: the UNet of {kind.folder.name} cannot denoise the latents of images of {size} x {size} pixels"
    with torch.device("meta"):
        clean, conditions = kind.inputs({name: tensor.to("meta") for name, tensor in kind.example(1).items()})
    check_forward(kind.without_memory(), clean, conditions, problem)
    clean, conditions = kind.inputs(kind.example(2))
    side = min(clean.shape[-1], 2 ** len(kind.network.config.block_out_channels))
    check_finite(kind.network, kind.noise_scheduler, clean[:, :, :side, :side], conditions)
