"""What a window and an epoch add up to: losses, the gradient noise scale, throughput."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from finetune.windows import Split

TIMESTEP_RANGES = 4  # equal ranges of the timesteps that losses are shown for
_BINS = 50  # finer ones that the smoothed loss compares images within


class WindowResult(NamedTuple):
    """What a window came to, the same on every process."""

    losses: np.ndarray  # float64 (n_w,), in the order of the window's positions
    grad_norm: float  # of the window's gradient, before clipping
    micro_grad_norm: float | None  # of a micro-batch's, root mean square over the processes' first ones
    stop: bool  # whether any process was told to stop

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.losses).all() and np.isfinite(self.grad_norm))


class Window:
    """What the micro-steps of one window leave behind. It stays on the device until the window's end, and costs one
    gather of a few numbers and one synchronisation then."""

    def __init__(self, split: Split):
        self.split = split
        self.losses: list[torch.Tensor] = []
        self.first_norm: torch.Tensor | None = None
        self.closed = False  # from here on the update may have begun

    def add(self, losses: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> None:
        """One micro-step is done, backward included.

        Args:
            losses: of the micro-step's slots, shape (micro,), padding included.
            parameters: hold the gradient so far. After the first of several micro-steps it is that micro-batch's own.
        """
        if not self.losses and self.split.gradient_accumulation_steps > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.first_norm = torch.nn.utils.get_total_norm(gradients).to(losses.dtype)
        self.losses.append(losses.detach())

    def close(
        self, accelerator: Accelerator, num_images: int, grad_norm: torch.Tensor, stop: bool = False
    ) -> WindowResult:
        """Bring the processes' parts together: run kP + r of the window was micro-step k of process r."""
        self.closed = True
        split, last = self.split, self.losses[-1]
        norms = [grad_norm.to(last.dtype), last.new_tensor(torch.nan) if self.first_norm is None else self.first_norm]
        mine = torch.cat([*self.losses, torch.stack([*norms, last.new_tensor(float(stop))])])
        parts = accelerator.gather(mine).double().cpu().numpy().reshape(split.num_processes, -1)
        runs = parts[:, :-3].reshape(split.num_processes, -1, split.micro_batch_size)
        losses = runs.transpose(1, 0, 2).reshape(-1)[:num_images]
        micro_grad_norm = None
        if len(self.losses) > 1 and num_images == split.global_batch_size:
            # Weights and Accelerate's division left 1/N of the micro-batch's mean; the scaler multiplied it.
            scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
            rms = float(np.sqrt((parts[:, -2] ** 2).mean()))
            micro_grad_norm = rms * split.gradient_accumulation_steps / scale
        return WindowResult(losses, float(parts[0, -3]), micro_grad_norm, bool(parts[:, -1].any()))


@dataclass
class GradientNoiseScale:
    """The batch size at which averaging more images stops paying: McCandlish et al. 2018, "An Empirical Model of
    Large-Batch Training", appendix A.1. Both estimates are averaged before their ratio is taken."""

    squared_gradient: float = 0.0  # |G|^2, running mean
    variance: float = 0.0  # tr(Sigma) = S, running mean
    updates: int = 0

    def add(self, small: float, big: float, small_batch: int, big_batch: int) -> None:
        """Squared norms of the gradient of a small and of a big batch, each the mean over its images."""
        squared_gradient = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        variance = (small - big) / (1 / small_batch - 1 / big_batch)
        self.updates += 1
        rate = max(1 / self.updates, 0.01)
        self.squared_gradient += rate * (squared_gradient - self.squared_gradient)
        self.variance += rate * (variance - self.variance)

    @property
    def value(self) -> float | None:
        """In images; None while the means do not make sense yet: both are differences of noisy norms."""
        known = self.squared_gradient > 0 and self.variance >= 0
        return self.variance / self.squared_gradient if known else None

    def advice(self, split: Split) -> str | None:
        """One sentence: the batch used, the batch at which returns diminish, and the setting that comes near it."""
        if self.value is None:
            return None
        steps = max(round(self.value / (split.micro_batch_size * split.num_processes)), 1)
        return (
            f"batches of {split.global_batch_size} images were used, and returns diminish from about {self.value:.0f} "
            f"on: training.gradient_accumulation_steps={steps} with micro-batches of {split.micro_batch_size} on "
            f"{split.num_processes} process(es) comes near it"
        )


@dataclass
class SmoothedLoss:
    """A training loss that the draw of timesteps does not move.

    The window's losses are compared with what images at their noise levels have cost lately: M * sum(loss) / sum(m),
    where m is the running mean of an image's range of timesteps and M the mean over all ranges. That leaves the change
    of the network and the images' own noise, of which a running mean over about twenty windows is taken.
    """

    means: list[float] = field(default_factory=lambda: [0.0] * _BINS)
    counts: list[int] = field(default_factory=lambda: [0] * _BINS)
    value: float | None = None

    def add(self, losses: np.ndarray, timesteps: np.ndarray, num_train_timesteps: int) -> float:
        """The smoothed loss after a window; both arrays (n_w,)."""
        bins = timesteps * _BINS // num_train_timesteps
        known = np.array(self.counts)[bins] > 0
        if known.any():
            expected = np.array(self.means)[bins[known]].sum()
            seen = np.array(self.means)[np.array(self.counts) > 0].mean()
            estimate = float(seen * losses[known].sum() / max(expected, 1e-30))
        else:
            estimate = float(losses.mean())
        self.value = estimate if self.value is None else self.value + 0.1 * (estimate - self.value)
        for index, loss in zip(bins.tolist(), losses.tolist(), strict=True):
            self.counts[index] += 1
            self.means[index] += max(1 / self.counts[index], 0.05) * (loss - self.means[index])
        return self.value


@dataclass
class EpochLoss:
    """The mean loss over the epoch's images so far, not over its updates: a short last window counts as it is long."""

    total: float = 0.0
    images: int = 0

    def add(self, losses: np.ndarray) -> None:
        self.total += float(losses.sum())
        self.images += len(losses)

    def close(self) -> float:
        """The epoch's mean; the next epoch starts."""
        mean = self.total / self.images
        self.total, self.images = 0.0, 0
        return mean


@dataclass
class Meters:
    """All running figures; they are saved with the run state, so that curves go on where they were."""

    epoch: EpochLoss = field(default_factory=EpochLoss)
    smoothed: SmoothedLoss = field(default_factory=SmoothedLoss)
    noise_scale: GradientNoiseScale = field(default_factory=GradientNoiseScale)

    @classmethod
    def from_state(cls, state: dict) -> "Meters":
        """The inverse of `dataclasses.asdict`."""
        return cls(
            EpochLoss(**state["epoch"]), SmoothedLoss(**state["smoothed"]), GradientNoiseScale(**state["noise_scale"])
        )

    def add_window(self, result: WindowResult, timesteps: np.ndarray, num_train_timesteps: int, split: Split) -> dict:
        """Take in a window; returns its scalars by name."""
        self.epoch.add(result.losses)
        if result.micro_grad_norm is not None and result.finite:
            small, big = split.micro_batch_size, split.global_batch_size
            self.noise_scale.add(result.micro_grad_norm**2, result.grad_norm**2, small, big)
        scalars = {
            "train/loss": float(result.losses.mean()),
            "train/loss_smoothed": self.smoothed.add(result.losses, timesteps, num_train_timesteps),
            "train/grad_norm": result.grad_norm,
        }
        if self.noise_scale.value is not None:
            scalars["train/gradient_noise_scale"] = self.noise_scale.value
        for name, loss in loss_by_timestep(result.losses, timesteps, num_train_timesteps).items():
            scalars[f"train/loss_by_timestep/{name}"] = loss
        return scalars


def loss_by_timestep(losses: np.ndarray, timesteps: np.ndarray, num_train_timesteps: int) -> dict[str, float]:
    """Mean loss per equal range of timesteps, by names such as `000-249`; ranges without an image are left out."""
    edges = [num_train_timesteps * part // TIMESTEP_RANGES for part in range(TIMESTEP_RANGES + 1)]
    width = len(str(num_train_timesteps - 1))
    ranges = {}
    for low, high in pairwise(edges):
        inside = (timesteps >= low) & (timesteps < high)
        if inside.any():
            ranges[f"{low:0{width}}-{high - 1:0{width}}"] = float(losses[inside].mean())
    return ranges


class Stopwatch:
    """Where the seconds of training go. What stands between updates (validation, samples, saving) is not counted."""

    def __init__(self):
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def tick(self, phase: str) -> None:
        """The time since the last tick was spent on this phase."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """The time since the last tick was no training."""
        self._last = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        phases, self.phases = self.phases, {}
        return phases
