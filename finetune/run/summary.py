"""The plan of a run, its results, and its model card, as text."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard, ModelCardData

from finetune.config import plain_yaml
from finetune.config.schema import Config
from finetune.core.batch import BatchLayout, window_range, windows_per_epoch
from finetune.core.kind import Kind
from finetune.core.shapes import Shape
from finetune.data.encodings import Encodings
from finetune.data.order import WindowSampler
from finetune.data.pixels import Images
from finetune.run.state import Length
from finetune.training.compute import has_bf16, with_prefix
from finetune.training.soundness import layout_dependent_layers

_WINDOWS_COUNTED = 100  # of the first epoch, whose micro-steps the plan gives


def table(title: str, rows: dict[str, str]) -> str:
    """Two columns for the console; a value may have several lines."""
    width = max(map(len, rows))
    cells = [
        (name if number == 0 else "", line)
        for name, value in rows.items()
        for number, line in enumerate(value.split("\n"))
    ]
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in cells)])


def plan(
    config: Config,
    accelerator: Accelerator,
    layout: BatchLayout,
    kind: Kind,
    num_images: int,
    num_held_out: int,
    notes: Sequence[str],
    flops: int,
    shapes: str | None = None,
) -> str:
    """What is about to be trained, and how; below that, what may surprise about it.

    Args:
        notes: what is done to the pictures before they are trained on, a line each.
        flops: of one image.
        shapes: what they make of the batch, where pictures have several.
    """
    batch = layout.global_batch_size
    length = Length.of(config, num_images, batch)
    channels, size = kind.image_format
    last = num_images - (length.steps_per_epoch - 1) * batch
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} mixed precision")
    if accelerator.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        precision += " (no native bf16 support on this CPU: slower than float32)"
    threads = f" with {torch.get_num_threads()} thread(s) each" if accelerator.device.type == "cpu" else ""
    trained = sum(parameter.numel() for parameter in kind.trainable().values())
    parameters = f"{trained / 1e6:.2f} M parameters"
    everything = sum(parameter.numel() for parameter in kind.network.parameters())
    if trained < everything:
        parameters += f" trained beside {(everything - trained) / 1e6:.2f} M that are frozen"
    classes = f", {len(kind.class_names)} classes" if kind.class_names else ""
    origin = config.model.pretrained or "from scratch"
    if kind.variant:
        origin += f" (its {kind.variant} weights, as there are no others)"
    resolution = str(kind.shapes[0]) if len(kind.shapes) == 1 else f"{len(kind.shapes)} shapes"
    if kind.made_for not in (None, size):
        resolution += f" (the model was made for {kind.made_for} x {kind.made_for})"
    rows = table(
        "Plan",
        {
            "device": f"{accelerator.device.type}, {layout.num_processes} process(es){threads}, {precision}"
            f"{_shares(config, layout)}",
            "model": f"{origin}: {parameters}, {kind.noise_scheduler.config.prediction_type} prediction{classes}",
            "images": f"{num_images} to train on, {num_held_out} held out; {resolution}, {channels} channel(s)",
            **({"pictures": "\n".join(notes)} if notes else {}),
            "batch": f"{batch} = {layout.micro_batch_size} per micro-batch x {layout.gradient_accumulation_steps} "
            f"accumulation steps x {layout.num_processes} process(es)",
            **({"shapes": shapes} if shapes else {}),
            "length": f"{length.total_steps} updates, {length.steps_per_epoch} an epoch "
            f"({length.total_steps / length.steps_per_epoch:.4g} epochs; an epoch's last update has {last} of {batch} "
            "images)",
            "evaluation": _evaluation(config, length, num_held_out),
            "compute": f"{with_prefix(flops)}FLOP an image, forward and backward",
            "learning rate": f"{config.optimizer.learning_rate:g}, {config.lr_scheduler.name}, "
            f"{config.lr_scheduler.warmup_steps} updates of warm-up",
            "output": config.output_dir,
        },
    )
    surprises = layout_dependence(layout_dependent_layers(kind.network)), unguided(config, kind)
    return "\n".join([rows, *filter(None, surprises)])


def data_notes(images: Images, held_out: Images | None, encodings: Encodings | None) -> list[str]:
    """What the plan says of the data, each line once."""
    sources = [source for source in (images, held_out, encodings) if source is not None]
    return list(dict.fromkeys(note for source in sources for note in source.notes))


def _shares(config: Config, layout: BatchLayout) -> str:
    """What `training.shard` makes of the processes; empty without it."""
    if not config.training.shard:
        return ""
    if layout.num_processes == 1:
        return "; training.shard has no effect with one process"
    return f"; each process holds 1/{layout.num_processes} of weights, gradients, optimizer and average"


def shapes_note(images: Mapping[Shape, int], sampler: WindowSampler) -> str | None:
    """Images of each shape, and the micro-steps of a window against those of one shape; None where all have one."""
    if sampler.shapes is None:
        return None
    layout, count = sampler.layout, len(sampler.shapes)
    windows = range(min(windows_per_epoch(count, layout.global_batch_size), _WINDOWS_COUNTED))
    steps = [sampler.dealing(0, window).micro_steps for window in windows]
    sizes = [len(window_range(window, count, layout.global_batch_size)) for window in windows]
    alone = [-(-size // (layout.micro_batch_size * layout.num_processes)) for size in sizes]
    counts = ", ".join(f"{number} of {shape}" for shape, number in images.items())
    mean = f"{np.mean(steps):.2f} micro-steps a window on average, {np.mean(alone):.2f} with one shape"
    return f"{counts}\n{mean}"


def _evaluation(config: Config, length: Length, num_held_out: int) -> str:
    validation, samples, parts = config.validation, config.samples, []
    if num_held_out:
        every = length.interval(validation.every_steps)
        parts.append(f"validation every {every} update(s), {validation.images} draws of the held-out images")
    if samples.count:
        parts.append(f"{samples.count} samples every {samples.every_steps} update(s)")
    return "; ".join(parts) or "none"


def unguided(config: Config, kind: Kind) -> str | None:
    """Warning text for guidance that has nothing to compare with, if that is so."""
    if not kind.conditional or config.training.condition_dropout > 0 or config.samples.guidance_scales == (1.0,):
        return None
    return (
        "Note: samples are guided, but training.condition_dropout is 0: the model does not learn what images look like "
        "without a class or caption, which guidance compares with"
    )


def layout_dependence(layers: list[str]) -> str | None:
    """Warning text for layers that break batch-layout invariance, if there are any."""
    if not layers:
        return None
    named = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return (
        "Note: the result of this run depends on its batch layout, since the network has layers that draw at random or "
        f"normalise over a micro-batch: {named}"
    )


def curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each line of a history that has this scalar."""
    return [(line["step"], line[name]) for line in history if name in line]


def peak_throughput(rates: dict[str, float]) -> str:
    """The machine's peak throughput, to compare with what a run achieves."""
    measured = ", ".join(f"{with_prefix(rate)}FLOP/s of {kernel}" for kernel, rate in rates.items())
    return f"Peak throughput of one process: {measured}"


def curves_folder(output_dir: Path) -> Path:
    """What TensorBoard is best pointed at: the folder of all runs, since it names runs by their paths below it.

    Not where that folder holds much else, which TensorBoard would search through again and again.
    """
    above = output_dir.absolute().parent
    return output_dir if above in (Path.cwd(), Path.home(), Path(above.root)) else output_dir.parent


def results(history: list[dict[str, Any]], updates: int, images: int, seconds: float, flops: int) -> dict[str, str]:
    """Results of the run by name, for the console and the model card.

    Args:
        seconds: of training, without evaluations and saves.
        flops: of one image.
    """
    rows = {"updates": f"{updates}, {images} images in {seconds:.0f} s of training, {images / seconds:.1f} images/s"}
    rows["compute"] = (
        f"{with_prefix(flops)}FLOP an image, {with_prefix(flops * images / seconds)}FLOP/s on all processes"
    )
    for title, name in {"last epoch": "train/epoch_loss", "smoothed": "train/loss_smoothed"}.items():
        if points := curve(history, name):
            rows[f"training loss, {title}"] = f"{points[-1][1]:.5f}"
    exported = curve(history, "validation/loss_ema") or curve(history, "validation/loss")
    if exported:
        step, best = min(exported, key=lambda point: point[1])
        rows["validation loss"] = f"{exported[-1][1]:.5f}, from {exported[0][1]:.5f}; best {best:.5f} at step {step}"
    if distances := curve(history, "validation/kernel_distance"):
        frechet = curve(history, "validation/frechet_distance")[-1][1]
        rows["kernel distance"] = f"{distances[-1][1]:.5f}, from {distances[0][1]:.5f}; Fréchet distance {frechet:.5f}"
    return rows


def hyperparameters(config: Config, global_batch_size: int, total_steps: int) -> dict[str, float | str]:
    """Settings by which TensorBoard compares runs; null is the word, since a number would be a setting."""
    return {
        "global_batch_size": global_batch_size,
        "updates": total_steps,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler": config.lr_scheduler.name,
        "snr_gamma": "null" if config.training.snr_gamma is None else f"{config.training.snr_gamma:g}",
        "timestep_sampling": config.training.timestep_sampling,
        "seed": config.seed,
    }


def _is_local(name: str) -> bool:
    """Whether a source or a model is named by a path of this machine, and not by its id on the hub."""
    path = os.path.abspath(os.path.expanduser(name))
    found = os.path.exists(path) or bool(glob.glob(path, recursive=True))
    return name != "digits" and (found or name.startswith((".", "/", "~")))


def _published(name: str) -> str:
    """A hub id as it is; of a local path the last part."""
    return Path(os.path.abspath(os.path.expanduser(name))).name if _is_local(name) else name


def _recipe(config: Config) -> str:
    """The config as YAML, without the paths of this machine."""
    values: dict[str, Any] = config.model_dump()
    values["output_dir"] = Path(os.path.abspath(config.output_dir)).name
    values["data"]["source"] = _published(config.data.source)
    if config.model.pretrained is not None:
        values["model"]["pretrained"] = _published(config.model.pretrained)
    if config.checkpoint.resume not in ("auto", "never"):
        values["checkpoint"]["resume"] = Path(config.checkpoint.resume).name
    return plain_yaml.write(values)


def model_card(config: Config, kind: Kind, rows: dict[str, str], picture: str | None) -> str:
    """The exported pipeline's README: origin, use, results, recipe. It names no path of this machine."""
    task = "text-to-image" if kind.captioned else "unconditional-image-generation"
    base, source, averaged = config.model.pretrained, config.data.source, config.ema.enabled
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffusers", task, *(["lora"] if config.model.lora else [])],
        base_model=None if base is None or _is_local(base) else base,
    )
    origin = "Trained from scratch" if base is None else f"Fine-tuned from `{_published(base)}`"
    images = "a local folder" if _is_local(source) else f"`{source}`"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(os.path.abspath(config.output_dir)).name}",
        f"{origin} on the images of {images}. Holds the {'averaged (EMA)' if averaged else 'last'} weights.",
        f"![samples]({picture})" if picture else "",
        "## Use",
        kind.usage(config.samples.inference_steps),
        "## Result",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Recipe",
        f"```yaml\n{_recipe(config)}```",
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))
