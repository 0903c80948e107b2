"""The denoiser and its noise scheduler: loaded or built, averaged, and given back as a diffusers pipeline.

What of a batch is noised and what conditions the network is decided here alone (`noised_and_conditioning`).
"""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo, upload_folder

from finetune.config import EMAConfig, ModelConfig
from finetune.errors import UserError, first_line
from finetune.files import writing


def load_model(config: ModelConfig, resolution: int | None, seed: int) -> tuple[UNet2DModel, DDPMScheduler]:
    """The network, in torch's default dtype and in training mode, and the scheduler that noises its images.

    Args:
        resolution: pixels a side to train at; by default what the model was made for. Either way it is the network's
            `config.sample_size` afterwards, so that the exported pipeline generates at the size that was trained.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    if config.pretrained is not None:
        unet, scheduler_config = _load_pretrained(config.pretrained)
    else:
        unet, scheduler_config = _build_unet(config.unet, seed), {}
    noise_scheduler = _build_noise_scheduler(scheduler_config, config.noise_scheduler)
    _check_unet(unet)
    unet.register_to_config(sample_size=_training_resolution(unet, resolution))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train(), noise_scheduler


def _load_pretrained(name: str) -> tuple[UNet2DModel, dict]:
    folder = Path(name) if os.path.isdir(name) else _download(name)
    index = _read_json(folder / "model_index.json", name, "a folder of a DDPM pipeline, as diffusers saves it")
    components = {part: value for part, value in index.items() if not part.startswith("_")}
    if components.get("unet") != ["diffusers", "UNet2DModel"] or set(components) != {"unet", "scheduler"}:
        found = ", ".join(f"{part}: {value}" for part, value in components.items())
        raise UserError(
            f"model.pretrained: {name}: found a {index.get('_class_name')} of {found}; expected a pipeline of a "
            "diffusers UNet2DModel and a scheduler (DDPMPipeline or DDIMPipeline)"
        )
    library, scheduler = components["scheduler"]
    if library != "diffusers" or scheduler not in DDPMScheduler._compatibles:
        raise UserError(
            f"model.pretrained: {name}: found the scheduler {library}.{scheduler}; expected one of diffusers' that "
            "noise like DDPM (DDPMScheduler, DDIMScheduler, PNDMScheduler, ...)"
        )
    # Pipelines of the first days keep every component's files side by side at the top.
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    try:
        unet, report = UNet2DModel.from_pretrained(
            unet_folder, torch_dtype=torch.get_default_dtype(), local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and torch each raise their own for an unreadable file
        raise UserError(
            f"model.pretrained: {unet_folder}: the weights cannot be loaded safely ({first_line(error)}); expected "
            "diffusion_pytorch_model.safetensors, or a .bin of plain tensors, that fits config.json"
        ) from error
    wrong = [f"{len(names)} {kind.replace('_', ' ')}" for kind, names in report.items() if names]
    if wrong:  # diffusers would go on with random numbers in their place
        raise UserError(f"model.pretrained: {unet_folder}: the weights do not fit config.json: {', '.join(wrong)}")
    return unet, _read_json(scheduler_folder / "scheduler_config.json", name, "the noise scheduler's config")


def _download(name: str) -> Path:
    try:
        return Path(DDPMPipeline.download(name))
    except Exception as error:  # the hub's client has a dozen, from a malformed id to no route to the host
        raise UserError(
            f"model.pretrained: {name!r} is no folder here, and the hub did not give it ({first_line(error)}); give a "
            "folder of a DDPM pipeline or a hub id, and check the connection and the login"
        ) from error


def _read_json(file: Path, name: str, expected: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.pretrained: {name}: {file.name} cannot be read ({first_line(error)}); expected {expected}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"model.pretrained: {name}: {file.name} holds no mapping; expected {expected}")
    return content


def _build_unet(config: dict[str, Any], seed: int) -> UNet2DModel:
    _check_keys("model.unet", config, UNet2DModel)
    with torch.random.fork_rng(
        devices=[]
    ):  # initial weights are a function of the seed; the global generator is not moved
        torch.manual_seed(seed)
        try:
            return UNet2DModel(**config)
        except Exception as error:  # whatever a wrong value runs into
            raise UserError(f"model.unet: UNet2DModel cannot be built from it: {first_line(error)}") from error


def _build_noise_scheduler(pretrained: dict, overrides: dict[str, Any]) -> DDPMScheduler:
    _check_keys("model.noise_scheduler", overrides, DDPMScheduler)
    try:
        noise_scheduler = DDPMScheduler.from_config({**pretrained, **overrides})
    except Exception as error:
        raise UserError(f"model.noise_scheduler: DDPMScheduler cannot be built: {first_line(error)}") from error
    kind = noise_scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"model.noise_scheduler.prediction_type: found {kind!r}; expected epsilon, v_prediction or sample"
        )
    return noise_scheduler


def _check_keys(section: str, given: dict[str, Any], model_class: type) -> None:
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    unknown = [key for key in given if key not in known]
    if unknown:
        near = {key: get_close_matches(str(key), known, 1) for key in unknown}
        raise UserError(
            *(
                f"{section}.{key}: {model_class.__name__} has no such setting; "
                + (f"did you mean {near[key][0]}?" if near[key] else f"it has {', '.join(known)}")
                for key in unknown
            )
        )


def _check_unet(unet: UNet2DModel) -> None:
    config = unet.config
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise UserError("model: the UNet is conditioned on classes; expected an unconditional one")
    if config.in_channels != config.out_channels:
        raise UserError(
            f"model: the UNet maps {config.in_channels} channels to {config.out_channels}; expected as many out as in "
            "(a learned variance is not supported)"
        )


def _training_resolution(unet: UNet2DModel, resolution: int | None) -> int:
    sample_size = unet.config.sample_size
    if isinstance(sample_size, list | tuple):
        sample_size = sample_size[0] if len(set(sample_size)) == 1 else None
    resolution = resolution or sample_size
    if resolution is None:
        raise UserError("data.resolution: not given, and the model has no square sample_size to take it from")
    halvings = len(unet.config.block_out_channels) - 1
    if resolution % 2**halvings:
        nearest = max(round(resolution / 2**halvings), 1) * 2**halvings
        raise UserError(
            f"data.resolution: found {resolution}; expected a multiple of {2**halvings}, since this UNet halves it "
            f"{halvings} times (nearest: {nearest})"
        )
    return resolution


def noised_and_conditioning(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clean tensor that noise is added to, (b, C, H, W) in [-1, 1], and the network's other arguments.

    For a pixel model: the images, and none. The uint8 pixels become floats here, on the device, at a quarter of the
    transfer.
    """
    return batch["images"].to(batch["noise"].dtype) / 127.5 - 1.0, {}


def split_dependent_layers(unet: torch.nn.Module) -> list[str]:
    """Layers whose result depends on how a window is split: active dropout (a global generator), batch statistics."""
    found = []
    for name, module in unet.named_modules():
        drops = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
        if drops or isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            found.append(f"{name} ({type(module).__name__})")
    return found


def make_ema(unet: UNet2DModel, config: EMAConfig) -> EMAModel | None:
    """diffusers' moving average, on the parameters' device, warmed up as 1 - (1 + step)^-power up to `decay`."""
    if not config.enabled:
        return None
    return EMAModel(unet.parameters(), decay=config.decay, use_ema_warmup=True, power=config.power, foreach=True)


@contextmanager
def averaged_weights(unet: UNet2DModel, ema: EMAModel | None) -> Iterator[None]:
    """Inside, the network holds the averaged weights; costs one copy of the weights in host memory."""
    if ema is None:
        yield
        return
    parameters = list(unet.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def save_pipeline(
    unet: UNet2DModel, noise_scheduler: DDPMScheduler, folder: Path, card: str, pictures: list[Path]
) -> None:
    """Write what `DDPMPipeline.from_pretrained` loads, with its model card; the folder is whole or not there."""
    partial = folder.with_name(folder.name + ".tmp")
    with writing(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            DDPMPipeline(unet=unet, scheduler=noise_scheduler).save_pretrained(partial)
            for picture in pictures:
                shutil.copy(picture, partial)
            (partial / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def push(folder: Path, repository: str) -> str:
    """Upload an exported pipeline to a hub repository, made where there is none yet; returns its address.

    Raises:
        UserError: if the hub does not take it; the folder stays, and a later start tries again.
    """
    try:
        create_repo(repository, exist_ok=True)
        upload_folder(repo_id=repository, folder_path=folder, commit_message="Fine-tuned pipeline")
    except Exception as error:  # the hub's client has a dozen, from no login to no route to the host
        raise UserError(
            f"export.push_to_hub: {repository}: the hub did not take {folder} ({first_line(error)}); log in with "
            "`hf auth login`, or set HF_TOKEN, and run the same command again",
            exit_code=1,
        ) from error
    return f"https://huggingface.co/{repository}"
