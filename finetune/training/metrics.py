"""Loss statistics per update and epoch, and where the seconds go."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy.typing as npt

from finetune.training.noise_scale import GradientNoiseScale
from finetune.training.smoothing import SmoothedLoss
from finetune.training.window import WindowResult

TIMESTEP_RANGES = 4  # equal ranges of the timesteps that losses are shown for


@dataclass
class EpochLoss:
    """The mean loss over the epoch's images so far, not over its updates: a short last batch weighs less."""

    total: float = 0.0
    images: int = 0

    def add(self, losses: npt.NDArray[Any]) -> None:
        self.total += float(losses.sum())
        self.images += len(losses)

    def close(self) -> float:
        """Return the epoch's mean and start the next epoch."""
        mean = self.total / self.images
        self.total, self.images = 0.0, 0
        return mean


@dataclass
class Meters:
    """All running statistics; saved with the run state, so that curves continue without a break."""

    epoch: EpochLoss = field(default_factory=EpochLoss)
    smoothed: SmoothedLoss = field(default_factory=SmoothedLoss)
    noise_scale: GradientNoiseScale = field(default_factory=GradientNoiseScale)

    def add_window(
        self,
        result: WindowResult,
        timesteps: npt.NDArray[Any],
        num_train_timesteps: int,
        groups: npt.NDArray[Any] | None = None,
    ) -> dict[str, float]:
        """Take in a window and return its scalars by name; `groups` as in `SmoothedLoss.add`."""
        self.epoch.add(result.losses)
        if result.micro_grad_norm is not None and result.finite:
            small, big = result.micro_batch, len(result.losses)
            self.noise_scale.add(result.micro_grad_norm**2, result.grad_norm**2, small, big)
        scalars = {
            "train/loss": float(result.losses.mean()),
            "train/loss_smoothed": self.smoothed.add(result.losses, timesteps, num_train_timesteps, groups),
            "train/grad_norm": result.grad_norm,
        }
        if (noise_scale := self.noise_scale.value) is not None:
            scalars["train/gradient_noise_scale"] = noise_scale
        for name, loss in loss_by_timestep(result.losses, timesteps, num_train_timesteps).items():
            scalars[f"train/loss_by_timestep/{name}"] = loss
        return scalars


def loss_by_timestep(
    losses: npt.NDArray[Any], timesteps: npt.NDArray[Any], num_train_timesteps: int
) -> dict[str, float]:
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
    """Where the seconds of training go; excludes validation, sampling and saving."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def tick(self, phase: str) -> None:
        """Book the time since the last tick on this phase."""
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """Leave out the time since the last tick."""
        self._last = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap."""
        phases, self.phases = self.phases, {}
        return phases
