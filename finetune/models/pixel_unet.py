"""UNet2DModel: loaded from a pipeline or built from a config, and checked before it is trained."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DModel

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError, first_line
from finetune.models.components import PIPELINES
from finetune.models.hub import read_json, variant
from finetune.models.noise_schedulers import check_scheduler
from finetune.models.unet import own_resolution


class Pretrained(NamedTuple):
    """What the folder of a pipeline says of a UNet2DModel, without its weights.

    Attributes:
        folder: of the network.
        class_names: the classes that the pipeline names, if it does.
    """

    folder: Path
    config: dict[str, Any]
    scheduler_config: dict[str, Any]
    class_names: list[str] | None


def read_pretrained(name: str, folder: Path) -> Pretrained:
    """Find a UNet2DModel in the folder of a pipeline, which the config calls `name`.

    Raises:
        UserError: if it is no pipeline of such a network.
    """
    index = read_json(folder / "model_index.json", name, "the folder of a pipeline, as diffusers saves it")
    components = {part: value for part, value in index.items() if not part.startswith("_") and part != "id2label"}
    if components.get("unet") != ["diffusers", "UNet2DModel"] or set(components) != {"unet", "scheduler"}:
        found = ", ".join(f"{part}: {value}" for part, value in components.items())
        raise UserError(
            f"model.pretrained: {name}: found a {index.get('_class_name')} of {found}; expected a "
            f"{', a '.join(PIPELINES)}, or a pipeline of a diffusers UNet2DModel and a scheduler (DDPMPipeline or "
            "DDIMPipeline)"
        )
    # The earliest diffusers pipelines keep every component's files side by side at the top.
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    scheduler_config = read_json(scheduler_folder / "scheduler_config.json", name, "the noise scheduler's config")
    library, scheduler, *_ = map(str, [*(components["scheduler"] or ()), "", ""])
    check_scheduler(name, library, scheduler, scheduler_config)
    config = read_json(unet_folder / "config.json", name, "the network's config")
    return Pretrained(unet_folder, config, scheduler_config, _class_names(index, config, name))


def load_unet(folder: Path) -> UNet2DModel:
    """A UNet2DModel with the weights in a folder, in torch's default dtype.

    Raises:
        UserError: if they cannot be loaded safely, or do not fit its config.
    """
    try:
        unet, report = UNet2DModel.from_pretrained(
            folder,
            dtype=torch.get_default_dtype(),
            local_files_only=True,
            output_loading_info=True,
            variant=variant(folder),
        )
    except Exception as error:  # diffusers, safetensors and torch each raise their own for an unreadable file
        raise UserError(
            f"model.pretrained: {folder}: the weights cannot be loaded safely ({first_line(error)}); expected "
            "diffusion_pytorch_model.safetensors, or a .bin of plain tensors, that fits config.json"
        ) from error
    wrong = [f"{len(names)} {kind.replace('_', ' ')}" for kind, names in report.items() if names]
    if wrong:  # diffusers puts random numbers in their place
        raise UserError(f"model.pretrained: {folder}: the weights do not fit config.json: {', '.join(wrong)}")
    return unet


def _class_names(index: dict[str, Any], config: dict[str, Any], name: str) -> list[str] | None:
    """The classes that a class-conditional pipeline names, by row: of all rows, or all but the last, "no class"."""
    named, embedded = index.get("id2label"), config.get("num_class_embeds")
    if named is None or embedded is None:
        return None
    count = len(named) if isinstance(named, dict) else 0
    rows = [str(row) for row in range(count)]
    fits = count in (embedded - 1, embedded) and sorted(named) == sorted(rows)
    if not fits or len({*map(str, named.values())}) < count:
        raise UserError(
            f"model.pretrained: {name}: model_index.json names the classes {named}; expected one name for each of the "
            f"rows 0 to {embedded - 1} of the class embedding, or for all but the last, which then means no class"
        )
    return [str(named[row]) for row in rows]


def build_unet(config: dict[str, Any], seed: int) -> UNet2DModel:
    """A UNet2DModel from its config, with initial weights that the seed decides."""
    with torch.random.fork_rng(devices=[]):  # the seed decides the weights; the global generator is left as it was
        torch.manual_seed(seed)
        return UNet2DModel(**config)


def check_unet(unet: UNet2DModel, noise_scheduler: DDPMScheduler, model: ModelConfig) -> None:
    """Raises UserError for networks that can be built and not be trained."""
    _check_time_embedding(unet, noise_scheduler)
    config = unet.config
    if config.class_embed_type is not None:
        raise UserError(
            f"model: found a UNet with class_embed_type {config.class_embed_type!r}; expected null, which embeds "
            "classes by their number"
        )
    if config.num_class_embeds is not None and model.unet is not None:
        raise UserError(
            f"model.unet.num_class_embeds: found {config.num_class_embeds}; leave it out, and set "
            "model.class_conditional=true to train classes: the data gives their number"
        )
    if config.num_class_embeds is not None and not model.class_conditional:
        raise UserError(
            f"model: the UNet is conditioned on {config.num_class_embeds} classes; set model.class_conditional=true "
            "and data.label_column to train it, or give an unconditional one"
        )
    if config.in_channels != config.out_channels:
        raise UserError(
            f"model: the UNet maps {config.in_channels} channels to {config.out_channels}; expected as many out as in "
            "(a learned variance is not supported)"
        )


def _check_time_embedding(unet: UNet2DModel, noise_scheduler: DDPMScheduler) -> None:
    config, steps = unet.config, noise_scheduler.config.num_train_timesteps
    if config.time_embedding_type == "fourier":
        raise UserError(
            "model.unet.time_embedding_type: found fourier, which takes the logarithm of the timestep and divides by "
            "it, and there is a timestep 0; expected positional or learned"
        )
    if config.time_embedding_type == "learned" and config.num_train_timesteps < steps:
        raise UserError(
            f"model.unet.num_train_timesteps: found {config.num_train_timesteps} learned embeddings; expected at least "
            f"{steps}, the noise scheduler's num_train_timesteps"
        )


def training_resolution(unet: UNet2DModel, resolution: int | None) -> int:
    """Pixels a side to train at: `resolution`, or what the model was made for; raises UserError if neither will do."""
    resolution = resolution or own_resolution(unet.config.sample_size)
    if resolution is None:
        raise UserError("data.resolution: not given, and the model has no square sample_size to take it from; set it")
    halvings = len(unet.config.block_out_channels) - 1
    if resolution % 2**halvings:
        nearest = max(round(resolution / 2**halvings), 1) * 2**halvings
        raise UserError(
            f"data.resolution: found {resolution}; expected a multiple of {2**halvings}, since this UNet halves it "
            f"{halvings} times (nearest: {nearest})"
        )
    return resolution
