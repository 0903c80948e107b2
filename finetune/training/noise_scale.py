"""The gradient noise scale: which batch size is large enough, and how well that is known."""

import math
from dataclasses import dataclass, field

from finetune.training.smoothing import Three

_FEWEST = 40  # updates; the means of fewer are not normal enough for an interval
_WIDEST = 4.0  # upper over lower bound, a factor of two either way: batch sizes go by powers of two


@dataclass
class GradientNoiseScale:
    """The batch size beyond which averaging more images brings little: McCandlish et al. 2018, "An Empirical Model of
    Large-Batch Training", appendix A.1.

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),   S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B),   noise scale = S / |G|^2

    with the gradients g_b and g_B of a micro-batch and of a window. Each update gives an unbiased and very noisy
    estimate of both; they are averaged before their ratio is taken. The noise scale grows as the loss falls, tenfold
    within a run, and early updates have the largest gradients: the k-th weighs about k^3 (polynomial-decay averaging,
    Shamir & Zhang 2013, "Stochastic Gradient Descent for Non-smooth Optimization", eta = 3), which is
    the last two fifths of a run of any length. How the estimates scatter gives the covariance of their means (running,
    by Finch 2009, "Incremental calculation of weighted mean and variance"), and that the interval of their ratio.
    """

    squared_gradient: float = 0.0  # |G|^2, running mean
    noise: float = 0.0  # S, the trace of the covariance of an image's gradient, running mean
    # running covariance of the updates' estimates: of S, of S and |G|^2, of |G|^2
    scatter: Three = field(default_factory=lambda: [0.0, 0.0, 0.0])
    squared_weights: float = 1.0  # sum of the squared weights of the updates in the means: 1 / (their effective number)
    updates: int = 0

    def add(self, small: float, big: float, small_batch: float, big_batch: int) -> None:
        """Squared norms of the gradient of a small and of a big batch, each the mean over its images.

        Where the first is a mean over small batches of several sizes, `small_batch` is their harmonic mean, since it is
        their inverse that the noise of each is proportional to.
        """
        squared_gradient = (big_batch * big - small_batch * small) / (big_batch - small_batch)
        noise = (small - big) / (1 / small_batch - 1 / big_batch)
        self.updates += 1
        rate = 4 / (self.updates + 3)
        off_noise, off_gradient = noise - self.noise, squared_gradient - self.squared_gradient
        self.noise += rate * off_noise
        self.squared_gradient += rate * off_gradient
        products = off_noise**2, off_noise * off_gradient, off_gradient**2
        self.scatter = [(1 - rate) * (old + rate * new) for old, new in zip(self.scatter, products, strict=True)]
        self.squared_weights = (1 - rate) ** 2 * self.squared_weights + rate**2

    @property
    def averaged_updates(self) -> float:
        """How many updates of equal weight would scatter as much as these."""
        return 1 / self.squared_weights

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval, in images; None while it has no upper bound or updates are too few.

        Fieller 1954, "Some problems in interval estimation": all ratios r for which the mean of S - r |G|^2 is within
        t standard errors of 0. A plain standard error of the ratio would be too small where |G|^2 may as well be 0.
        """
        if self.updates < _FEWEST:
            return None
        freedom = self.averaged_updates - 1
        t = 1.960 + 2.372 / freedom + 2.822 / freedom**2  # Student's 97.5 %: Abramowitz & Stegun 26.7.5
        noise, both, gradient = (t**2 * covariance / freedom for covariance in self.scatter)
        a = self.squared_gradient**2 - gradient
        b = self.noise * self.squared_gradient - both
        c = self.noise**2 - noise
        if self.squared_gradient <= 0 or a <= 0 or b * b < a * c:
            return None
        root = math.sqrt(b * b - a * c)
        return max((b - root) / a, 0.0), max((b + root) / a, 0.0)

    @property
    def value(self) -> float | None:
        """In images; None until it is known to a factor of about two either way."""
        interval = self.interval
        if interval is None or interval[1] > _WIDEST * interval[0]:
            return None
        return self.noise / self.squared_gradient
