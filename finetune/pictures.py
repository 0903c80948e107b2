"""Numbers and pixels made into pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from finetune.files import whole

_SMALLEST_TILE = 64  # pixels a side: digits of 16 pixels are shown enlarged


def tiled(images: np.ndarray, columns: int | None = None) -> Image.Image:
    """A grid of uint8 (n, H, W, C) images, C in 1, 3, 4, near to square unless `columns` is given."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    scale = max(-(-_SMALLEST_TILE // max(height, width)), 1)
    gap = 2
    canvas = np.full(
        (rows * (height * scale + gap) + gap, columns * (width * scale + gap) + gap, channels), 255, np.uint8
    )
    for index, image in enumerate(images):
        top = gap + index // columns * (height * scale + gap)
        left = gap + index % columns * (width * scale + gap)
        canvas[top : top + height * scale, left : left + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def save_png(picture: Image.Image, file: Path) -> None:
    """Written whole or not at all, with the folders above it."""
    with whole(file) as partial:
        picture.save(partial, format="PNG")


def loss_curve(history: list[dict], file: Path) -> None:
    """Draw the loss of each update, the average of each epoch, and the validation loss, over the update steps.

    Args:
        history: one mapping per logged line: `step` and any of the scalars' names.
    """
    from matplotlib.figure import Figure  # half a second of imports that only the end of a run needs

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "train/loss": ("each update", {"color": "tab:blue", "alpha": 0.35, "linewidth": 0.8}),
        "train/loss_smoothed": ("smoothed", {"color": "tab:blue", "linewidth": 1.8}),
        "train/epoch_loss": ("average of each epoch", {"color": "tab:orange", "marker": "o", "linewidth": 1.2}),
        "validation/loss": ("validation", {"color": "tab:green", "linewidth": 1.5}),
        "validation/loss_ema": ("validation, averaged weights", {"color": "tab:red", "linewidth": 1.5}),
    }
    for name, (label, style) in styles.items():
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("update step")
    axes.set_ylabel("loss (mean squared error)")
    axes.set_title("Loss over the run")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
