"""How readable the loss is: what stratified timesteps, bigger windows and smoothing do to its noise, in numbers.

python tests/benchmarks/loss_signal.py            # about eight minutes on two CPU cores
python tests/benchmarks/loss_signal.py --short    # the smallest sizes: a smoke test

On the digits of configs/digits.yaml, at fixed weights (those of the base) and over real trainings, and on simulated
losses whose true mean is known.
"""

import time
from pathlib import Path

from environment import FOLDER, ROOT, machine, parser

import numpy as np
import torch
from table import head, row

from finetune.config.load import load_config
from finetune.core.batch import BatchLayout
from finetune.data.batches import Batches
from finetune.data.loading import load_data
from finetune.data.order import WindowSampler
from finetune.models.load import load_kind
from finetune.run.summary import curve
from finetune.training.metrics import Meters
from finetune.training.objective import loss_per_image
from finetune.training.smoothing import SmoothedLoss
from harness.compare import history
from harness.processes import finish
from harness.simulated_losses import FALLS, simulate
from harness.trend_estimators import ESTIMATORS

DIGITS = ROOT / "configs/digits.yaml"
PHASES = ("data", "compute", "update", "logging")
OVERRIDES = [f"model.pretrained={ROOT / 'configs/digits-base'}"]


@torch.no_grad()
def losses_at_fixed_weights(batch: int, sampling: str, windows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(losses, timesteps) of full windows, one epoch after the other, through the base."""
    config = load_config(DIGITS, OVERRIDES)
    kind = load_kind(config.model, None, config.seed)
    noise_scheduler = kind.noise_scheduler
    train_images, _ = load_data(config.data, kind.image_format, config.seed)
    steps = noise_scheduler.config.num_train_timesteps
    batches = Batches(train_images, config.seed, steps, sampling, "center", False)
    sampler = WindowSampler(len(train_images), config.seed, BatchLayout(batch, 1, 1))
    found, epoch = [], 0
    while len(found) < windows:
        sampler.seek(epoch, 0)
        for slots in sampler:
            if all(slot.weight for slot in slots) and len(found) < windows:
                read = batches.__getitems__(slots)
                clean, conditions = kind.inputs(read)
                noisy = noise_scheduler.add_noise(clean, read["noise"], read["timesteps"])
                prediction = kind.network(noisy, read["timesteps"], **conditions).sample
                losses = loss_per_image(noise_scheduler, prediction, clean, read["noise"], read["timesteps"], None)
                found.append((losses.double().numpy(), read["timesteps"].numpy()))
        epoch += 1
    return found


def stratified_against_uniform(windows: int) -> None:
    """Mean and standard deviation, over windows, of a window's loss at fixed weights."""
    head("images in a window", "windows", "independent timesteps, mean ± sd", "stratified", "ratio of variances")
    for batch in (4, 8, 16, 64):
        count = max(windows * 16 // batch, 2)
        means = {
            sampling: np.array([losses.mean() for losses, _ in losses_at_fixed_weights(batch, sampling, count)])
            for sampling in ("uniform", "stratified")
        }
        deviations = {sampling: values.std(ddof=1) for sampling, values in means.items()}
        figures = [f"{means[sampling].mean():.4f} ± {deviations[sampling]:.4f}" for sampling in means]
        row(str(batch), str(count), *figures, f"{(deviations['uniform'] / deviations['stratified']) ** 2:.1f}")


def smoothed_against_raw(windows: int) -> None:
    """Standard deviation of both curves at fixed weights, where nothing but noise moves them."""
    found = losses_at_fixed_weights(16, "stratified", windows)
    smoothed = SmoothedLoss()
    raw_curve = np.array([losses.mean() for losses, _ in found])
    smoothed_curve = np.array([smoothed.add(losses, timesteps, 1000) for losses, timesteps in found])
    settled = [values[len(values) // 3 :] for values in (raw_curve, smoothed_curve)]
    head(
        f"standard deviation over {len(settled[0])} windows of 16",
        "train/loss",
        "train/loss_smoothed",
        "ratio",
        "limit",
    )
    for name, limit, of in (("from step to step", "0.25", np.diff), ("around its mean", "", np.asarray)):
        raw, smooth = (of(values).std(ddof=1) for values in settled)
        row(name, f"{raw:.5f}", f"{smooth:.5f}", float(smooth / raw), limit)


def compared(raw: np.ndarray, smoothed: np.ndarray, truth: np.ndarray) -> str:
    """The largest deviation of a smoothed curve from the true one, in standard deviations of the raw one, and its own
    step-to-step deviation over the raw one's in the last two thirds, both measured from the true curve."""
    raw, smoothed = raw / truth - 1, smoothed / truth - 1
    steps = [np.diff(values[len(values) // 3 :]).std() for values in (smoothed, raw)]
    return f"{np.abs(smoothed).max() / raw.std():.1f}, {steps[0] / steps[1]:.2f}"


def estimators_on_simulated_falls() -> None:
    """The same windows of 64 images for all of them."""
    head("largest deviation from the truth, share of the step-to-step deviation: fall", *ESTIMATORS)
    for fall in FALLS:
        simulated = list(simulate(fall, 64, 0))
        levels = np.array([window.level for window in simulated])
        row(fall, *compared_on([(window.losses, window.timesteps) for window in simulated], levels))


def compared_on(windows: list[tuple[np.ndarray, np.ndarray]], truth: np.ndarray) -> list[str]:
    """What each estimator makes of (losses, timesteps)."""
    raw = np.array([losses.mean() for losses, _ in windows])
    curves = []
    for estimator in ESTIMATORS.values():
        smoothed = SmoothedLoss(estimator())
        curves.append(np.array([smoothed.add(losses, timesteps, 1000) for losses, timesteps in windows]))
    return [compared(raw, curve, truth) for curve in curves]


def local_mean(windows: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The geometric mean of the raw curve over nine updates around each; over fewer at the ends, as many before as
    after."""
    raw = np.array([losses.mean() for losses, _ in windows])
    widths = [min(4, index, len(raw) - 1 - index) for index in range(len(raw))]
    return np.exp([np.log(raw[i - width : i + width + 1]).mean() for i, width in enumerate(widths)])


def record(folder: Path, config: str, updates: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(losses, timesteps) of every update of a run."""

    def watch() -> None:
        add, kept = Meters.add_window, []

        def recording(meters, result, timesteps, *rest, **options):
            kept.append((result.losses, timesteps))
            np.savez(folder / "windows.npz", *(array for pair in kept for array in pair))
            return add(meters, result, timesteps, *rest, **options)

        Meters.add_window = recording

    options = ["samples.count=0", "validation.images=8", "validation.every_steps=1000000"]
    options += [f"training.max_train_steps={updates}"]
    options += [f"model.pretrained={ROOT / 'configs/digits-base'}"] if "base" not in config else []
    folder.mkdir(parents=True)
    finish(
        "--config", ROOT / config, f"output_dir={folder}", *options, folder=folder / "log", before=watch, seconds=1200
    )
    with np.load(folder / "windows.npz") as arrays:
        return [(arrays[f"arr_{2 * i}"], arrays[f"arr_{2 * i + 1}"]) for i in range(updates)]


def estimators_on_digits(base: Path, updates: int) -> None:
    """Real runs in windows of 64, against the local mean of their raw curves, which has a third of the raw noise."""
    head("largest deviation from the local mean, share of the step-to-step deviation", *ESTIMATORS)
    for title, config in (
        ("digits, from the base", "configs/digits.yaml"),
        ("from scratch", "configs/digits-base.yaml"),
    ):
        windows = record(base / Path(config).stem, config, updates)
        row(f"{title}, {updates} updates", *compared_on(windows, local_mean(windows)))


def cost_of_smoothing() -> None:
    """Of one window, the fastest of several rounds."""
    head("images in a window", "microseconds", "limit")
    for images, limit in ((64, 100), (16384, 1000)):
        rng, smoothed, fastest = np.random.default_rng(0), SmoothedLoss(), float("inf")
        losses, timesteps = rng.gamma(4, size=(20, images)), rng.integers(0, 1000, (20, images))
        for _ in range(10):
            start = time.perf_counter()
            for window in zip(losses, timesteps, strict=True):
                smoothed.add(*window, 1000)
            fastest = min(fastest, (time.perf_counter() - start) / 20)
        row(str(images), f"{1e6 * fastest:.0f}", str(limit))


def fine_tune(folder: Path, *overrides: str) -> list[dict]:
    """The history of a run of configs/digits.yaml."""
    options = [*OVERRIDES, f"output_dir={folder}", "samples.count=0", *overrides]
    finish("--config", DIGITS, *options, folder=folder.with_suffix(".log"), seconds=1200)
    return history(folder)


def small_batch_against_large(base: Path, updates: int) -> None:
    """What the Hugging Face course recipe shows (each update's loss, 4 images x 2 accumulation steps at independent
    timesteps), beside a batch of 64 with stratified timesteps."""
    every = max(updates // 14, 2)
    small = fine_tune(
        base / "small",
        *("training.global_batch_size=8", "training.micro_batch_size=4", "training.timestep_sampling=uniform"),
        *(f"training.max_train_steps={updates}", "optimizer.learning_rate=5e-4", "validation.every_steps=1000000"),
    )
    large = fine_tune(base / "large", f"training.max_train_steps={updates}", f"validation.every_steps={every}")
    validation = curve(large, "validation/loss")[1:]
    head(
        f"loss over {updates} updates", "step to step", "fall of the trend", "ratio", "correlation with validation/loss"
    )
    for title, lines, name in (
        ("4 images x 2, independent timesteps, train/loss", small, "train/loss"),
        ("64 images, train/loss", large, "train/loss"),
        ("64 images, train/loss_smoothed", large, "train/loss_smoothed"),
    ):
        points = dict(curve(lines, name))
        steps, values = np.array(list(points)), np.array(list(points.values()))
        fall = float(abs(np.polyval(np.polyfit(steps, values, 2), [steps[0], steps[-1]]) @ [1, -1]))
        jitter = float(np.diff(values).std(ddof=1))
        paired = np.array([(points[step], loss) for step, loss in validation])
        correlation = f"{np.corrcoef(paired.T)[0, 1]:.2f}" if lines is large else ""
        row(title, f"{jitter:.4f}", f"{fall:.4f}", jitter / fall, correlation)

    phases = {name: sum(seconds for _, seconds in curve(large, f"time/{name}")) for name in PHASES}
    head("seconds of training", "share", "limit")
    for name, seconds in phases.items():
        row(name, f"{100 * seconds / sum(phases.values()):.2f} %", "1 %" if name == "logging" else "")


def noise_scale(base: Path, updates: int) -> None:
    """The estimate at weights that stand still: windows of 64 in micro-batches of 16."""
    head("timesteps", f"gradient noise scale after {updates} updates, images")
    for sampling in ("uniform", "stratified"):
        lines = fine_tune(
            base / f"scale-{sampling}",
            *(f"training.timestep_sampling={sampling}", f"training.max_train_steps={updates}"),
            *("optimizer.learning_rate=1e-12", "lr_scheduler={name: constant}", "validation.every_steps=1000000"),
        )
        scale = curve(lines, "train/gradient_noise_scale")
        row(sampling, f"{scale[-1][1]:.0f}" if scale else "not known yet")


def main() -> None:
    short = parser(__doc__).parse_args().short
    if short:
        OVERRIDES.append("validation.images=8")
    torch.set_num_threads(1)
    print(machine())
    base = Path(FOLDER.name)
    small_batch_against_large(base, 8 if short else 98)
    noise_scale(base, 2 if short else 200)
    stratified_against_uniform(4 if short else 120)
    smoothed_against_raw(12 if short else 240)
    estimators_on_simulated_falls()
    estimators_on_digits(base, 6 if short else 182)
    cost_of_smoothing()


if __name__ == "__main__":
    with FOLDER:
        main()
