"""How readable the loss is: what stratified timesteps, bigger windows and smoothing do to its noise, in numbers.

    python tests/benchmarks/loss_signal.py            # about three minutes on two CPU cores
    python tests/benchmarks/loss_signal.py --short    # a few seconds: does it run

All on the digits of configs/digits.yaml: at fixed weights (the base as it came), and over real fine-tunings.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from finetune import model  # noqa: E402
from finetune.config import load_config  # noqa: E402
from finetune.data import Batches, load_images, split_images  # noqa: E402
from finetune.metrics import SmoothedLoss  # noqa: E402
from finetune.objective import loss_per_image  # noqa: E402
from finetune.windows import Split, WindowSampler  # noqa: E402

DIGITS = ROOT / "configs/digits.yaml"
OVERRIDES = [f"model.pretrained={ROOT / 'configs/digits-base'}"]


@torch.no_grad()
def losses_at_fixed_weights(batch: int, sampling: str, windows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(losses, timesteps) of full windows, one epoch after the other, through the base as it came."""
    config = load_config(DIGITS, OVERRIDES)
    unet, noise_scheduler = model.load_model(config.model, None, config.seed)
    train_images, _ = split_images(load_images(config.data, 1, 16), config.data, config.seed)
    steps = noise_scheduler.config.num_train_timesteps
    batches = Batches(train_images, config.seed, steps, sampling, 16, "center", False)
    sampler = WindowSampler(len(train_images), config.seed, Split(batch, 1, 1))
    found, epoch = [], 0
    while len(found) < windows:
        sampler.seek(epoch, 0)
        for slots in sampler:
            if all(slot.weight for slot in slots) and len(found) < windows:
                read = batches.__getitems__(slots)
                clean, _ = model.noised_and_conditioning(read)
                noisy = noise_scheduler.add_noise(clean, read["noise"], read["timesteps"])
                prediction = unet(noisy, read["timesteps"]).sample
                losses = loss_per_image(noise_scheduler, prediction, clean, read["noise"], read["timesteps"], None)
                found.append((losses.double().numpy(), read["timesteps"].numpy()))
        epoch += 1
    return found


def print_table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def stratified_against_uniform(windows: int) -> None:
    rows = []
    for batch in (4, 8, 16, 64):
        count = max(windows * 16 // batch, 12)
        means = {
            sampling: np.array([losses.mean() for losses, _ in losses_at_fixed_weights(batch, sampling, count)])
            for sampling in ("uniform", "stratified")
        }
        deviations = {sampling: values.std(ddof=1) for sampling, values in means.items()}
        ratio = (deviations["uniform"] / deviations["stratified"]) ** 2
        figures = [f"{means[sampling].mean():.4f} ± {deviations[sampling]:.4f}" for sampling in means]
        rows.append([str(batch), str(count), *figures, f"{ratio:.1f}"])
    print_table(
        "Loss of a window at fixed weights, mean ± standard deviation over windows",
        ["images", "windows", "independent timesteps", "stratified", "ratio of variances"],
        rows,
    )


def smoothed_against_raw(windows: int) -> None:
    found = losses_at_fixed_weights(16, "stratified", windows)
    smoothed = SmoothedLoss()
    curves = {
        "raw": np.array([losses.mean() for losses, _ in found]),
        "smoothed": np.array([smoothed.add(losses, timesteps, 1000) for losses, timesteps in found]),
    }
    settled = {name: curve[len(curve) // 3 :] for name, curve in curves.items()}
    steps = {name: np.diff(curve).std(ddof=1) for name, curve in settled.items()}
    spread = {name: curve.std(ddof=1) for name, curve in settled.items()}
    rows = [
        ["from step to step", *(f"{value:.5f}" for value in steps.values()), f"{steps['smoothed'] / steps['raw']:.3f}"],
        [
            "around its mean",
            *(f"{value:.5f}" for value in spread.values()),
            f"{spread['smoothed'] / spread['raw']:.3f}",
        ],
    ]
    print_table(
        f"Standard deviation of the loss at fixed weights, windows of 16, {len(settled['raw'])} windows (limit 0.25)",
        ["", "train/loss", "train/loss_smoothed", "ratio"],
        rows,
    )


def fine_tune(folder: Path, *overrides: str) -> list[dict]:
    from tiny import run_here

    config = load_config(DIGITS, [*OVERRIDES, f"output_dir={folder}", "samples.count=0", *overrides])
    run_here(config.model_dump(mode="json"), folder.with_suffix(".yaml"))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(history: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in history if name in line]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])


def notebook_against_this(base: Path, updates: int) -> None:
    """The notebook drew the loss of each window of 4 images x 2 accumulation steps at independent timesteps."""
    notebook = fine_tune(
        base / "notebook",
        *("training.global_batch_size=8", "training.micro_batch_size=4", "training.timestep_sampling=uniform"),
        *(f"training.max_train_steps={updates}", "optimizer.learning_rate=5e-4", "validation.every_steps=1000000"),
    )
    ours = fine_tune(base / "ours", f"training.max_train_steps={updates}", "validation.every_steps=7")
    rows = []
    for title, history, name in (
        ("notebook: 4 images x 2, raw", notebook, "train/loss"),
        ("64 images, raw", ours, "train/loss"),
        ("64 images, smoothed", ours, "train/loss_smoothed"),
    ):
        steps, values = curve(history, name)
        trend = abs(np.polyval(np.polyfit(steps, values, 2), [steps[0], steps[-1]]) @ [1, -1])
        jitter = np.diff(values).std(ddof=1)
        rows.append([title, f"{jitter:.5f}", f"{trend:.5f}", f"{jitter / trend:.3f}"])
    print_table(
        f"A real fine-tuning of {updates} updates: the curve's step-to-step standard deviation over its trend",
        ["curve", "step to step", "fall of the trend", "ratio"],
        rows,
    )

    at, validation = curve(ours, "validation/loss")
    rows = []
    for name in ("train/loss", "train/loss_smoothed"):
        steps, values = curve(ours, name)
        paired = [(values[steps == step][0], loss) for step, loss in zip(at, validation, strict=True) if step > 0]
        rows.append([name, str(len(paired)), f"{np.corrcoef(np.array(paired).T)[0, 1]:.3f}"])
    print_table("Correlation with validation/loss over that fine-tuning", ["curve", "points", "correlation"], rows)

    phases = {name: curve(ours, f"time/{name}")[1] for name in ("data", "compute", "update", "logging")}
    total = sum(values.sum() for values in phases.values())
    print_table(
        "Where the seconds of training went (limit for logging: 1 %)",
        ["phase", "share"],
        [[name, f"{100 * values.sum() / total:.2f} %"] for name, values in phases.items()],
    )


def noise_scale(base: Path, updates: int) -> None:
    rows = []
    for sampling in ("uniform", "stratified"):
        history = fine_tune(
            base / f"scale-{sampling}",
            *(f"training.timestep_sampling={sampling}", f"training.max_train_steps={updates}"),
            *("optimizer.learning_rate=1e-12", "lr_scheduler={name: constant}", "validation.every_steps=1000000"),
        )
        scale = curve(history, "train/gradient_noise_scale")[1]
        rows.append([sampling, f"{scale[-1]:.0f}" if len(scale) else "not above zero"])
    print_table(
        f"Gradient noise scale at fixed weights, {updates} windows of 64, micro-batches of 16",
        ["timesteps", "images"],
        rows,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    stratified_against_uniform(4 if short else 120)
    smoothed_against_raw(12 if short else 240)
    with tempfile.TemporaryDirectory() as folder:
        notebook_against_this(Path(folder), 21 if short else 98)
        noise_scale(Path(folder), 3 if short else 26)
