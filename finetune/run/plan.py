"""The plan of a run, as text: what will be done, to what, and what may surprise about it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator

from finetune.config.schema import Config
from finetune.core.batch import BatchLayout, window_range, windows_per_epoch
from finetune.core.kind import Kind
from finetune.core.shapes import Shape
from finetune.core.sharding import held_bytes
from finetune.data.encodings import RequiredEncodings
from finetune.data.order import WindowSampler
from finetune.data.pixels import Images
from finetune.run.state import Length
from finetune.run.table import table
from finetune.training.compute import encoding_flops, has_bf16, with_prefix
from finetune.training.memory import state_parts
from finetune.training.optim import highest_rate
from finetune.training.soundness import layout_dependent_layers

_WINDOWS_COUNTED = 100  # of the first epoch, whose micro-steps the plan gives


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
            "learning rate": _learning_rate(config, length),
            "output": config.output_dir,
        },
    )
    surprises = (
        layout_dependence(layout_dependent_layers(kind.network)),
        unguided(config, kind),
        untold(config, kind),
        unused_negative(config),
    )
    return "\n".join([rows, *filter(None, surprises)])


def data_notes(kind: Kind, images: Images, held_out: Images | None, encodings: RequiredEncodings | None) -> list[str]:
    """What the plan says of the data, each line once."""
    sources = [source for source in (images, held_out, encodings) if source is not None]
    notes = list(dict.fromkeys(note for source in sources for note in source.notes))
    if kind.crop_encoder is not None:
        megabytes = held_bytes(kind.crop_encoder.parameters()) / 1e6
        notes.append(
            f"random crops are encoded in the loop: {with_prefix(encoding_flops(kind, images.shapes))}FLOP an image by "
            f"{megabytes:.1f} MB of weights that stay in memory; data.crop=center encodes images once, before training"
        )
    return notes


def _shares(config: Config, layout: BatchLayout) -> str:
    """What `training.shard` makes of the processes; empty without it."""
    if not config.training.shard:
        return ""
    if layout.num_processes == 1:
        return "; training.shard has no effect with one process"
    return f"; each process holds 1/{layout.num_processes} of {state_parts(config.ema.enabled)}"


def shapes_note(images: Mapping[Shape, int], sampler: WindowSampler) -> str | None:
    """Images of each shape, and the micro-steps of a window against those of one shape; None where all have one."""
    if sampler.shapes is None:
        return None
    layout, count = sampler.layout, len(sampler.shapes)
    windows = range(min(windows_per_epoch(count, layout.global_batch_size), _WINDOWS_COUNTED))
    steps = [sampler.dealing(0, window).micro_steps for window in windows]
    sizes = [len(window_range(window, count, layout.global_batch_size)) for window in windows]
    alone = [layout.micro_steps(size) for size in sizes]
    counts = ", ".join(f"{number} of {shape}" for shape, number in images.items())
    mean = f"{np.mean(steps):.2f} micro-steps per update on average, {np.mean(alone):.2f} if all had one shape"
    return f"{counts}\n{mean}"


def _learning_rate(config: Config, length: Length) -> str:
    peak, schedule = config.optimizer.learning_rate, config.lr_scheduler
    highest = highest_rate(config.optimizer, schedule, length.total_steps)
    reached = "" if highest > 0.999 * peak else f", never above {highest:.3g} in this run"
    return f"{peak:g}, {schedule.name}, {schedule.warmup_steps} updates of warm-up{reached}"


def _evaluation(config: Config, length: Length, num_held_out: int) -> str:
    validation, samples, parts = config.validation, config.samples, []
    if num_held_out:
        every = length.interval(validation.every_steps)
        parts.append(f"validation every {every} update(s), {validation.images} draws of the held-out images")
    if samples.count:
        parts.append(f"{samples.count} samples every {samples.every_steps} update(s)")
    if quality := validation.quality:
        parts.append(f"quality of {quality.images} samples every {quality.every_steps} update(s)")
    return "; ".join(parts) or "none"


def unguided(config: Config, kind: Kind) -> str | None:
    """Warning text for guidance whose unconditional prediction is not trained, if that is so."""
    if not kind.conditional or config.training.condition_dropout > 0 or config.samples.guidance_scales == (1.0,):
        return None
    return (
        "Note: samples are guided, but training.condition_dropout is 0: the prediction without a class or caption that "
        "guidance needs is not trained"
    )


def untold(config: Config, kind: Kind) -> str | None:
    """Warning text for a dropout of conditions, other than the default one, of a model that has none."""
    dropout, default = (
        config.training.condition_dropout,
        type(config.training).model_fields["condition_dropout"].default,
    )
    if kind.conditional or dropout in (0, default):
        return None
    return "Note: training.condition_dropout has no effect: the model is unconditional"


def unused_negative(config: Config) -> str | None:
    """Warning text for a negative prompt of samples that are not guided, if that is so."""
    if config.samples.negative_prompt is None or set(config.samples.guidance_scales) != {1.0}:
        return None
    return "Note: samples.negative_prompt has no effect: samples.guidance_scale is 1, which is no guidance"


def layout_dependence(layers: list[str]) -> str | None:
    """Warning text for layers that break batch-layout invariance, if there are any."""
    if not layers:
        return None
    named = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return (
        "Note: the result of this run depends on its batch layout, since the network has layers that draw at random or "
        f"normalise over a micro-batch: {named}"
    )


def peak_throughput(rates: dict[str, float]) -> str:
    """The machine's peak throughput, to compare with what a run achieves."""
    measured = ", ".join(f"{with_prefix(rate)}FLOP/s of {kernel}" for kernel, rate in rates.items())
    return f"Peak throughput of one process: {measured}"
