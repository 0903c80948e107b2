"""Text-to-image pipelines: loaded from a folder, and checked before they are trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.models.components import Folder
from finetune.models.encoders import PipelineEncoders
from finetune.models.lora import DTYPES, LoRA, add_adapters
from finetune.models.noise_schedulers import build_noise_scheduler, check_scheduler
from finetune.models.stable_diffusion import StableDiffusion, check_shapes
from finetune.models.unet import outline, own_resolution


class StableDiffusionOutline:
    """A model as its pipeline's configs describe it: its shapes, on the meta device, without memory for weights.

    Attributes:
        network: of these shapes, with the adapters that `config.lora` asks for; the weights that are trained require
            gradients.
        crop_encoder: the VAE, where it encodes random crops while updates run; else None.
    """

    def __init__(self, config: ModelConfig, path: Path, index: dict[str, Any], resolution: int | None, crops: bool):
        """
        Args:
            path: the pipeline's folder.
            index: its model_index.json.
            resolution: pixels a side to train at; None: what the model was made for.
            crops: random ones are trained, which cannot be encoded before.

        Raises:
            UserError: one line that names the key, what was found and what was expected.
        """
        name = str(config.pretrained)
        if config.class_conditional:
            raise UserError(
                f"model.class_conditional: found true with {name}, a {index['_class_name']}, which is conditioned on "
                "captions; expected false"
            )
        self.config, self.folder = config, Folder(path, name, index)
        settings = self.folder.config("scheduler", "scheduler_config.json")
        library, scheduler, *_ = map(str, [*(index.get("scheduler") or ()), "", ""])
        check_scheduler(name, library, scheduler, settings)
        # Latents are not bounded; DDPM's default is to clip, where a scheduler of another class says nothing of it.
        self.noise_scheduler = build_noise_scheduler(settings | {"clip_sample": False}, config.noise_scheduler)
        where = f"model.pretrained: {path / 'unet/config.json'}"
        self.network = outline(UNet2DConditionModel, self.folder.config("unet"), where)
        vae = self.folder.config("vae")
        self.factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self.crop_encoder = _outlined_vae(vae, path) if crops else None
        side = own_resolution(self.network.config.sample_size)
        self.made_for = side and side * self.factor
        self.resolution = _checked_resolution(resolution or self.made_for, self.factor, self.network)
        self.dtype = DTYPES[config.lora.base_dtype] if config.lora else torch.float32
        if config.lora is not None:
            torch.nn.Module.to(self.network, self.dtype)  # diffusers' own `to` warns
            with torch.device("meta"):
                add_adapters(self.network, config.lora)

    def load(self, seed: int) -> StableDiffusion:
        """The UNet with its weights, and what is known of its encoders; the seed draws adapters.

        Raises:
            UserError: if they cannot be loaded safely, do not fit each other, or predict what is not finite.
        """
        half = self.dtype != torch.float32
        network = self.folder.load("unet", self.dtype if half else torch.get_default_dtype())
        network.register_to_config(sample_size=self.resolution // self.factor)
        encoders = PipelineEncoders(self.folder, self.crop_encoder)
        encoders.check()
        if self.config.lora is None:
            self.folder.load_checker()  # which the export will need
        _check_unet(network, encoders, self.folder)
        network.requires_grad_(True).train()  # of LoRA, the adapters alone
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        parts = self.folder, network, self.noise_scheduler, encoders, self.made_for, self.resolution
        kind = StableDiffusion(*parts) if self.config.lora is None else LoRA(self.config.lora, seed, *parts)
        check_shapes(kind, kind.shapes)
        return kind


def _outlined_vae(config: dict[str, Any], path: Path) -> AutoencoderKL:
    """The VAE on the meta device, in float32 as it is loaded whatever torch's default."""
    vae = outline(AutoencoderKL, config, f"model.pretrained: {path / 'vae/config.json'}").requires_grad_(False)
    return torch.nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns


def _checked_resolution(resolution: int | None, factor: int, network: UNet2DConditionModel) -> int:
    if resolution is None:
        raise UserError("data.resolution: not given, and the model has no square sample_size to take it from; set it")
    halvings = len(network.config.block_out_channels) - 1
    multiple = factor * 2**halvings
    if resolution % multiple:
        nearest = max(round(resolution / multiple), 1) * multiple
        raise UserError(
            f"data.resolution: found {resolution}; expected a multiple of {multiple}, since the VAE makes one latent "
            f"of {factor} pixels a side, and the UNet halves latents {halvings} times (nearest: {nearest})"
        )
    return resolution


def _check_unet(network: UNet2DConditionModel, encoders: PipelineEncoders, folder: Folder) -> None:
    """Raises UserError for UNets of other tasks: inpainting, depth, instructions, distilled guidance, refiners."""
    config, channels = network.config, encoders.latent_channels
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
