"""What else could average a falling loss: the estimators that `Trend` was chosen from."""

import math

import numpy as np

from finetune.training.smoothing import Trend


class DebiasedMean(Trend):
    """An exponential mean over about twenty updates, without the weight that a first value has by default."""

    def add(self, estimate: float, variance: float) -> float:
        self.updates += 1
        self.level += max(1 / self.updates, 0.1) * (estimate - self.level)
        return self.level


class RandomWalk(Trend):
    """A Kalman filter for a level that walks at random, with the variance that the windows measure.

    The steps of the walk are as large as innovations were beyond what that variance explains, over some ten updates.
    """

    excess = 0.0

    def add(self, estimate: float, variance: float) -> float:
        self.updates += 1
        if self.updates == 1:
            self.level, self.covariance[0] = estimate, variance
            return self.level
        innovation = estimate / self.level - 1
        self.excess += 0.1 * (max(innovation**2 - self.covariance[0] - variance, 0.0) - self.excess)
        prior = max(self.covariance[0] + self.excess, variance / 9)  # a gain of at least 0.1
        gain = prior / (prior + variance)
        self.level *= 1 + gain * innovation
        self.covariance[0] = prior * (1 - gain)
        return self.level


class LinearFit(Trend):
    """A linear fit of the logarithm as in `Trend`, but always over about eight updates, whatever the noise."""

    def add(self, estimate: float, variance: float) -> float:
        self.updates += 1
        self.logarithms = [*getattr(self, "logarithms", [])[-59:], math.log(estimate)]
        ago = np.arange(len(self.logarithms))[::-1]
        weights = 0.875 ** (ago / 2)  # polyfit squares them
        self.level = math.exp(np.polyfit(-ago, self.logarithms, min(len(ago) - 1, 1), w=weights)[-1])
        return self.level


ESTIMATORS: dict[str, type[Trend]] = {
    "debiased mean": DebiasedMean,
    "random walk": RandomWalk,
    "linear fit": LinearFit,
    "linear fit, shortened at changes": Trend,
}
