"""A run in words: what it will be, what it came to, and the card of its pipeline."""

import os
from pathlib import Path

from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard, ModelCardData

from finetune.compute import has_bf16, in_words
from finetune.config import Config, to_yaml
from finetune.windows import Split, windows_per_epoch


def table(title: str, rows: dict[str, str]) -> str:
    """Two columns for the console."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def plan(
    config: Config,
    accelerator: Accelerator,
    split: Split,
    unet: UNet2DModel,
    noise_scheduler: DDPMScheduler,
    num_images: int,
    num_held_out: int,
    flops: int,
) -> str:
    """What is about to be trained, and how, before it starts; `flops` are those of one image."""
    batch, training = split.global_batch_size, config.training
    steps_per_epoch = windows_per_epoch(num_images, batch)
    total_steps = training.max_train_steps or steps_per_epoch * training.num_epochs
    channels, size = unet.config.in_channels, unet.config.sample_size
    last = num_images - (steps_per_epoch - 1) * batch
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} mixed precision")
    if accelerator.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        precision += " (this CPU has no unit for it: slower than float32)"
    return table(
        "Plan",
        {
            "device": f"{accelerator.device.type}, {split.num_processes} process(es), {precision}",
            "model": f"{config.model.pretrained or 'from scratch'}: {unet.num_parameters() / 1e6:.2f} M parameters, "
            f"{noise_scheduler.config.prediction_type} prediction",
            "images": f"{num_images} to train on, {num_held_out} held out; {size} x {size}, {channels} channel(s)",
            "batch": f"{batch} = {split.micro_batch_size} per micro-batch x {split.gradient_accumulation_steps} "
            f"accumulation steps x {split.num_processes} process(es)",
            "length": f"{total_steps} updates, {steps_per_epoch} an epoch ({total_steps / steps_per_epoch:.4g} epochs; "
            f"an epoch's last update has {last} of {batch} images)",
            "compute": f"{in_words(flops)}FLOP an image, forward and backward",
            "learning rate": f"{config.optimizer.learning_rate:g}, {config.lr_scheduler.name}, "
            f"{config.lr_scheduler.warmup_steps} updates of warm-up",
            "output": config.output_dir,
        },
    )


def split_dependence(layers: list[str]) -> str:
    """That these layers of a network make a run depend on how it is split."""
    named = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return (
        "Note: this run depends on how its batches are split over micro-batches and processes, since the network has "
        f"layers that draw at random or normalise over a micro-batch: {named}"
    )


def curve(history: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a history that has this scalar."""
    return [(line["step"], line[name]) for line in history if name in line]


def ceiling(rates: dict[str, float]) -> str:
    """What the machine computes at the most, beside what a run achieves."""
    measured = ", ".join(f"{in_words(rate)}FLOP/s of {kernel}" for kernel, rate in rates.items())
    return f"Ceiling: {measured}, in one process"


def results(history: list[dict], updates: int, images: int, seconds: float, flops: int) -> dict[str, str]:
    """What the run came to, by name, for the console and the model card.

    Args:
        seconds: of training, without evaluations and saves.
        flops: of one image.
    """
    rows = {"updates": f"{updates}, {images} images in {seconds:.0f} s of training, {images / seconds:.1f} images/s"}
    rows["compute"] = f"{in_words(flops)}FLOP an image, {in_words(flops * images / seconds)}FLOP/s on all processes"
    for title, name in {"last epoch": "train/epoch_loss", "smoothed": "train/loss_smoothed"}.items():
        if points := curve(history, name):
            rows[f"training loss, {title}"] = f"{points[-1][1]:.5f}"
    exported = curve(history, "validation/loss_ema") or curve(history, "validation/loss")
    if exported:
        step, best = min(exported, key=lambda point: point[1])
        rows["validation loss"] = f"{exported[-1][1]:.5f}, from {exported[0][1]:.5f}; best {best:.5f} at step {step}"
    return rows


def hyperparameters(config: Config, batch: int, updates: int, history: list[dict]) -> tuple[dict, dict[str, float]]:
    """The settings in which runs are compared, and the last values of the curves in which they are judged."""
    settings = {
        "global_batch_size": batch,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler": config.lr_scheduler.name,
        "updates": updates,
        "snr_gamma": config.training.snr_gamma or 0.0,
        "timestep_sampling": config.training.timestep_sampling,
        "seed": config.seed,
    }
    names = ("train/epoch_loss", "train/loss_smoothed", "validation/loss", "validation/loss_ema")
    return settings, {name: points[-1][1] for name in names if (points := curve(history, name))}


def model_card(config: Config, rows: dict[str, str], picture: str | None) -> str:
    """The exported pipeline's README: what it was made from, how, what came out, how to use it."""
    base, source, averaged = config.model.pretrained, config.data.source, config.ema.enabled
    is_hub_id = base is not None and not os.path.isdir(base)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "unconditional-image-generation"],
        base_model=base if is_hub_id else None,
    )
    origin = f"Fine-tuned from `{base}`" if base else "Trained from scratch"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(config.output_dir).name}",
        f"{origin} on the images of `{source}`. Holds the {'averaged (EMA)' if averaged else 'last'} weights.",
        f"![samples]({picture})" if picture else "",
        "## Use",
        "```python\nfrom diffusers import DDIMPipeline\n\n"
        'pipeline = DDIMPipeline.from_pretrained("PATH_OR_REPOSITORY")\n'
        f"images = pipeline(batch_size=4, num_inference_steps={config.samples.inference_steps}).images\n```",
        "## Result",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Recipe",
        f"```yaml\n{to_yaml(config)}```",
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))
