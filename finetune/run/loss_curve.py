"""The loss curve of a finished run, drawn as a PNG file."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.core.files import atomic


def loss_curve(history: list[dict[str, Any]], file: Path, steps_per_epoch: int) -> None:
    """Draw the loss of each update, the average of each epoch, and the validation loss, over the update steps.

    The picture is named after the folder that it lies in, the run's.

    Args:
        history: one mapping per logged line: `step` and any of the scalars' names.
        steps_per_epoch: for the axis of epochs, at the top.
    """
    from matplotlib.figure import Figure  # half a second of imports, needed only at the end of a run

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "train/loss": ("each update", {"color": "tab:blue", "alpha": 0.35, "linewidth": 0.8}),
        "train/loss_smoothed": ("smoothed", {"color": "tab:blue", "linewidth": 1.8}),
        "train/epoch_loss": ("average of each epoch", {"color": "tab:orange", "marker": "o", "linewidth": 1.2}),
        "validation/loss": ("validation", {"color": "tab:green", "marker": "s", "linewidth": 1.5}),
        "validation/loss_ema": (
            "validation, averaged weights",
            {"color": "tab:red", "marker": "D", "linewidth": 1.5},
        ),
        "validation/loss_base": (
            "validation, before the first update",
            {"color": "gray", "linestyle": "--", "linewidth": 1.0},
        ),
    }
    for name, (label, style) in styles.items():
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    axes.set_xlabel("update step")
    to_epoch, to_step = partial(np.multiply, 1 / steps_per_epoch), partial(np.multiply, steps_per_epoch)
    epochs = axes.secondary_xaxis("top", functions=(to_epoch, to_step))
    epochs.set_xlabel("epoch")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_title(f"Loss of {file.absolute().parent.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(file) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
