"""Draws the README's pictures: a window of many shapes; of a run of configs/digits-classes.yaml digits and the loss.

python docs/make_pictures.py                              # trains first: about two minutes on two CPU cores
python docs/make_pictures.py --run runs/digits-classes    # from a run that is finished
python docs/make_pictures.py --window                     # only how a window of many shapes is dealt out
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune.core.batch import BatchLayout  # noqa: E402 - found once the path is set
from finetune.core.dealing import deal_by_shape  # noqa: E402
from finetune.core.shapes import Shape, run_shapes  # noqa: E402

PICTURES = ROOT / "docs/pictures"
ROWS, COLUMNS = 4, 10  # of digits; a column a class
THEMES = {  # as GitHub shows pages: background, text, grid lines, each update, smoothed, validation
    "light": ("#ffffff", "#1f2328", "#d1d9e0", "#9ec5f4", "#0550ae", "#bc4c00"),
    "dark": ("#0d1117", "#e6edf3", "#30363d", "#2f5d94", "#79c0ff", "#ffa657"),
}


def train(output_dir: Path) -> None:
    command = [sys.executable, "train.py", "--config", "configs/digits-classes.yaml", f"output_dir={output_dir}"]
    subprocess.run(command, cwd=ROOT, check=True)


def drawn_by_the_base() -> np.ndarray:
    """Samples of the model that is fine-tuned, which cannot be asked for a digit."""
    pipeline = DDIMPipeline.from_pretrained(str(ROOT / "configs/digits-base"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return tiled(pipeline(ROWS * COLUMNS, generator, num_inference_steps=40, output_type="np").images)


def drawn_by_class(folder: Path) -> np.ndarray:
    """Samples of the model that was trained, asked for 0 to 9 in each row."""
    pipeline = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    asked = list(pipeline.labels) * ROWS
    images = pipeline(asked, generator=generator, num_inference_steps=40, guidance_scale=2.0, output_type="np").images
    return tiled(images)


def tiled(images: np.ndarray) -> np.ndarray:
    """One image of ROWS x COLUMNS digits, in 0 .. 1."""
    images = images[..., 0]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    size = padded.shape[1]
    return padded.reshape(ROWS, COLUMNS, size, size).transpose(0, 2, 1, 3).reshape(ROWS * size, COLUMNS * size)


def draw_digits(axes: Axes, pixels: np.ndarray, title: str, labels: list[str], text: str) -> None:
    """A grid of digits with a label above each column."""
    for column, label in enumerate(labels):
        axes.text((column + 0.5) * pixels.shape[1] / COLUMNS, -4, label, color=text, fontsize=9, ha="center")
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, color=text, fontsize=11, pad=18 if labels else 6)
    axes.axis("off")


def draw_loss(axes: Axes, history: list[dict], colours: tuple[str, ...]) -> None:
    background, text, lines, update, smoothed, validation = colours
    for name, label, style in (
        ("train/loss", "each update, 64 images", {"color": update, "linewidth": 1}),
        ("train/loss_smoothed", "smoothed", {"color": smoothed, "linewidth": 2.2}),
        ("validation/loss", "held-out images", {"color": validation, "linewidth": 1.2, "marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in history if name in line]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_title("loss", color=text, fontsize=11)
    axes.set_xlabel("update", color=text)
    axes.set_facecolor(background)
    axes.tick_params(colors=text)
    axes.grid(color=lines, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(lines)
    axes.legend(facecolor=background, edgecolor=lines, labelcolor=text, fontsize=9)


def draw(run: Path) -> None:
    """docs/pictures/digits-light.png and digits-dark.png, of a finished run."""
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = drawn_by_the_base(), drawn_by_class(run / "pipeline")
    for theme, colours in THEMES.items():
        figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained", facecolor=colours[0])
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), facecolor=colours[0])
        above, below = left.subplots(2, 1)
        draw_digits(above, before, "before: a model that draws the digits 0 to 4", [], colours[1])
        title = f"after {history[-1]['step']} updates: it draws the digit that you ask for"
        draw_digits(below, after, title, [str(digit) for digit in range(COLUMNS)], colours[1])
        draw_loss(right.subplots(), history, colours)
        file = PICTURES / f"digits-{theme}.png"
        figure.savefig(file)
        _shrink(file)


def draw_window() -> None:
    """docs/pictures/window-light.png and window-dark.png: 32 pictures of five shapes, dealt to two processes."""
    ladder = run_shapes(5, 64, 8)
    shapes = np.random.default_rng(4).choice(len(ladder), 32, p=(0.15, 0.15, 0.1, 0.4, 0.2))
    dealing = deal_by_shape(shapes, BatchLayout(4, 4, 2))
    for theme, (background, text, lines, *fills) in THEMES.items():
        figure = Figure(figsize=(10, 2.6), dpi=110, layout="constrained", facecolor=background)
        above, *below = figure.subplots(1 + dealing.num_processes, 1)
        above.set_title("a window: 32 positions of the epoch's order", color=text, fontsize=10, loc="left")
        _draw_row(above, [[*range(32)]], shapes, ladder, (lines, background, fills))
        for number, (axes, process) in enumerate(zip(below, dealing.micro_batches, strict=True), 1):
            title = f"process {number}: {len(process)} micro-batches of at most 4, each of one shape"
            axes.set_title(title, color=text, fontsize=10, loc="left")
            _draw_row(axes, [one.places.tolist() for one in process], shapes, ladder, (lines, background, fills))
        file = PICTURES / f"window-{theme}.png"
        figure.savefig(file)
        _shrink(file)


def _draw_row(axes: Axes, groups: list[list[int]], shapes: np.ndarray, ladder: list[Shape], colours: tuple) -> None:
    """Places of a window as rectangles of their shapes, with a frame around each micro-batch."""
    lines, number, fills = colours
    left, gap, tallest = 0.0, 10, max(shape.height for shape in ladder)
    for group in groups:
        start = left
        for place in group:
            shape = ladder[shapes[place]]
            left += gap
            bottom, fill = (tallest - shape.height) / 2, fills[shapes[place] % len(fills)]
            axes.add_patch(Rectangle((left, bottom), shape.width, shape.height, facecolor=fill))
            axes.text(
                left + shape.width / 2, tallest / 2, str(place), color=number, fontsize=7, ha="center", va="center"
            )
            left += shape.width
        left += gap
        axes.add_patch(Rectangle((start, -gap), left - start, tallest + 2 * gap, fill=False, edgecolor=lines))
        left += 2 * gap
    axes.set_xlim(-gap, 2500)
    axes.set_ylim(-2 * gap, tallest + 2 * gap)
    axes.set_aspect("equal")
    axes.set_anchor("W")
    axes.axis("off")


def _shrink(file: Path) -> None:
    """Save a picture without its alpha channel, in 64 colours."""
    Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="draw this finished run instead of training one")
    parser.add_argument("--window", action="store_true", help="draw only how a window of many shapes is dealt out")
    arguments = parser.parse_args()
    run = arguments.run
    PICTURES.mkdir(exist_ok=True)
    draw_window()
    if arguments.window:
        return
    with tempfile.TemporaryDirectory() as folder:
        if run is None:
            run = Path(folder, "digits-classes")
            train(run)
        draw(run)


if __name__ == "__main__":
    main()
