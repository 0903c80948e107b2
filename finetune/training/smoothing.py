"""A smoothed training loss, corrected for which timesteps were drawn."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

_BINS = 50  # equal ranges of timesteps; the images within one are compared
_TINY = 1e-30  # keeps logarithms and quotients finite where every loss is zero
Three = Annotated[list[float], Field(min_length=3, max_length=3)]


@dataclass
class Trend:
    """A local linear fit of the logarithm of a noisy positive series, which gives the fit's value at the newest point.

    Recursive least squares with exponential forgetting (Ljung 1999, "System Identification"), written as
    a Kalman filter for level and slope. An innovation further off than three of its standard errors is a change and
    not noise: the older points are then forgotten until it is three standard errors (the adaptive fading of Zhou &
    Frank 1996, "Strong tracking filtering", for one output).
    """

    level: float = 0.0
    slope: float = 0.0  # of the logarithm, per update
    covariance: Three = field(default_factory=lambda: [0.0, 0.0, 0.25])  # level, both, slope; of the logarithm
    updates: int = 0

    def add(self, estimate: float, variance: float) -> float:
        """The level after one more point.

        Args:
            estimate: above 0.
            variance: of its noise, relative to its square.
        """
        self.updates += 1
        if self.updates == 1:
            self.level, self.covariance[0] = estimate, variance
            return self.level
        # A memory of eight updates leaves 0.17 of the raw step-to-step deviation. Early on it is a quarter of the run's
        # age: over more, the fall of a run from scratch is no line.
        forgetting = 1 - 1 / min(8, 1 + self.updates / 4)
        expected = self.level * math.exp(self.slope)
        a, b, c = self.covariance
        a, b, c = (a + 2 * b + c) / forgetting, (b + c) / forgetting, c / forgetting
        # As a logarithm a doubling is as far as a halving, and an outlier of a skewed noise not as far as it looks.
        forget = max((math.log(estimate / expected) ** 2 / 9 - variance) / a, 1.0)
        a, b, c = forget * a, forget * b, forget * c
        level_gain, slope_gain = a / (a + variance), b / (a + variance)
        innovation = estimate / expected - 1  # not its logarithm, whose mean is below zero
        self.level = expected * (1 + level_gain * innovation)
        self.slope = min(max(self.slope + slope_gain * innovation, -1.0), 1.0)
        self.covariance = [a * (1 - level_gain), b * (1 - level_gain), c - slope_gain * b]
        return self.level


@dataclass
class SmoothedLoss:
    """The training loss, corrected for which timesteps were drawn, averaged over about eight updates without lag.

    An image's loss is modelled as level x baseline x noise. The baseline is that of its noise level (its range of
    timesteps) and of its group, relative to their mean; it follows the images as a running mean of loss / level, so
    that a falling loss does not leave it behind. A window then measures the level, and how well it does:

        level' = sum(loss) / sum(baseline)                                                   (a ratio estimator)
        variance of level' / level = s^2 sum(baseline^2) / sum(baseline)^2
        s^2 = mean of (loss - level' x baseline)^2 / mean of (level' x baseline)^2           (over recent images)

    (Cochran 1977, "Sampling Techniques".) `Trend` averages these measurements. The first value is the
    first window's mean loss.
    """

    trend: Trend = field(default_factory=Trend)
    baselines: list[float] = field(default_factory=list)  # by group, then by range of timesteps
    images: list[int] = field(default_factory=list)  # seen of each
    squares: float = 1.0  # sum of squared relative residuals of recent images, and their degrees of freedom;
    freedom: float = 1.0  # a first window of one image has none of its own

    def __post_init__(self) -> None:
        if len(self.baselines) != len(self.images) or len(self.images) % _BINS:
            raise ValueError(f"{len(self.baselines)} baselines of {len(self.images)} ranges, not of {_BINS} a group")

    def add(
        self,
        losses: npt.NDArray[np.float64],
        timesteps: npt.NDArray[np.int64],
        num_train_timesteps: int,
        groups: npt.NDArray[np.int64] | None = None,
    ) -> float:
        """The smoothed loss after a window of n images.

        Args:
            losses: finite, shape (n,).
            timesteps: shape (n,).
            groups: small whole numbers, shape (n,): images are compared within their group, such as those with a
                condition and those without. None: all are of one group.
        """
        cells, losses = timesteps * _BINS // num_train_timesteps, np.maximum(losses, _TINY)
        if groups is not None:
            cells = cells + _BINS * groups
        size = max((int(cells.max()) // _BINS + 1) * _BINS, len(self.images))
        images = np.array(self.images + [0] * (size - len(self.images)))
        baselines = self._complete(images)

        expected = baselines[cells]
        total, squares = float(expected.sum()), float(expected @ expected)
        estimate = float(losses.sum()) / total
        residuals = losses - estimate * expected
        variance = self._pooled(float(residuals @ residuals) / (estimate**2 * squares), len(losses))
        level = self.trend.add(estimate, max(variance * squares / total**2, 1e-12))

        count = np.bincount(cells, minlength=size)
        seen = images + count
        means = np.bincount(cells, losses, size) / np.maximum(count, 1) / level
        rate = np.maximum(count / np.maximum(seen, 1), 1 - 0.95**count)  # a mean of all, later of about 20 images
        baselines = np.maximum(baselines + rate * (means - baselines), 1e-6)
        # Weighed as often as each was drawn: the level is then the mean loss of the images that are drawn.
        self.baselines = (baselines * (seen.sum() / (seen @ baselines))).tolist()
        self.images = seen.tolist()
        return level

    def _complete(self, images: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The baselines; where no image was seen yet, interpolated between those that were, of all groups together."""
        baselines = np.ones(len(images))
        baselines[: len(self.baselines)] = self.baselines
        if images.all():
            return baselines
        table, seen = baselines.reshape(-1, _BINS), images.reshape(-1, _BINS)
        total = seen.sum(0)
        known = total.nonzero()[0]
        if len(known):
            means = (seen * table).sum(0)[known] / total[known]
            table = np.where(seen > 0, table, np.interp(np.arange(_BINS), known, means))
        return table.ravel()

    def _pooled(self, square: float, count: int) -> float:
        """The relative variance of an image's loss, over this window and some thirty images before it.

        Args:
            square: mean squared residual of this window's images over their mean squared expectation.
        """
        if count > 1:  # a single image has no residual
            keep = 32 / (32 + count)
            self.squares = keep * self.squares + count * square
            self.freedom = keep * self.freedom + count - 1
        return self.squares / self.freedom
