"""What a finished run says of its batch size, in words and as overrides that try another."""

import json
import math
import re
import shlex

from finetune.config.schema import Config
from finetune.core.batch import BatchLayout
from finetune.training.noise_scale import GradientNoiseScale


def batch_advice(noise_scale: GradientNoiseScale, config: Config, layout: BatchLayout, num_images: int) -> str | None:
    """What the gradient noise scale says about a run's batch and, where another size is better, overrides that try it.

    They go at the end of the run's own command. Another batch is another run, with a folder of its own.
    """
    interval, value = noise_scale.interval, noise_scale.value
    if interval is None or value is None:
        return None
    nearest = _nearest(layout, min(value, num_images), interval)
    used, other, (low, high) = layout.global_batch_size, nearest.global_batch_size, interval
    recent = round(noise_scale.averaged_updates)
    text = (
        f"Gradient noise scale over about the last {recent} updates: {_about(value)} images (95 % interval "
        f"{_about(low)} to {_about(high)}). Batches larger than that bring little. This run uses {used}"
    )
    if low <= used <= high or other == used:
        return f"{text}, which is about right."
    overrides = _overrides(config, nearest)
    return f"{text}; to try {other}, which is another run, add to the command:\n  {overrides}"


def _about(number: float) -> str:
    """Two digits of it: more are not known."""
    return f"{float(f'{number:.2g}'):g}"


def _nearest(layout: BatchLayout, batch: float, interval: tuple[float, float]) -> BatchLayout:
    """The layout of about so many images on as many processes.

    Of micro-batches as large as they are where that comes out within the interval, else of smaller ones.
    """
    micro, processes = layout.micro_batch_size, layout.num_processes
    steps = max(round(batch / (micro * processes)), 1)
    if not interval[0] <= micro * steps * processes <= interval[1]:
        steps = math.ceil(batch / (micro * processes)) or 1
        micro = max(round(batch / (steps * processes)), 1)
    return BatchLayout(micro, steps, processes)


def _overrides(config: Config, layout: BatchLayout) -> str:
    """Overrides of what the config gives of the batch, as they are typed into a shell."""
    training = config.training
    changes = {"output_dir": f"{config.output_dir.rstrip('/')}-batch-{layout.global_batch_size}"}
    if config.checkpoint.resume not in ("auto", "never"):
        changes["checkpoint.resume"] = "auto"  # a checkpoint of this run cannot start that one
    if training.global_batch_size is not None:
        changes["training.global_batch_size"] = str(layout.global_batch_size)
    if training.micro_batch_size not in (None, "auto", layout.micro_batch_size):
        changes["training.micro_batch_size"] = str(layout.micro_batch_size)
    if training.gradient_accumulation_steps not in (None, layout.gradient_accumulation_steps):
        changes["training.gradient_accumulation_steps"] = str(layout.gradient_accumulation_steps)
    return " ".join(shlex.quote(f"{key}={_yaml(value)}") for key, value in changes.items())


def _yaml(text: str) -> str:
    """The text as YAML: JSON's quotes, where it might be read as something else than text."""
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text, ensure_ascii=False)
