"""The gradient noise scale: which batch size is large enough, and how well that is known."""

import json
import math
import re
import shlex
from dataclasses import dataclass, field

from finetune.config.schema import Config
from finetune.core.batch import BatchLayout
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
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval, in images; None while it has no upper bound or updates are too few.

        Fieller 1954, "Some problems in interval estimation": all ratios r for which the mean of S - r |G|^2 is within
        t standard errors of 0. A plain standard error of the ratio would be too small where |G|^2 may as well be 0.
        """
        if self.updates < _FEWEST:
            return None
        freedom = 1 / self.squared_weights - 1
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

    def advice(self, config: Config, layout: BatchLayout, num_images: int) -> str | None:
        """What the noise scale says about this run's batch and, where another size is better, overrides that try it.

        They go at the end of the run's own command. Another batch is another run, with a folder of its own.
        """
        interval = self.interval
        if interval is None or self.value is None:
            return None
        nearest = _nearest(layout, min(self.value, num_images), interval)
        used, other, (low, high) = layout.global_batch_size, nearest.global_batch_size, interval
        recent = round(1 / self.squared_weights)
        text = (
            f"Gradient noise scale over about the last {recent} updates: {_about(self.value)} images (95 % interval "
            f"{_about(low)} to {_about(high)}). Batches larger than that bring little. This run uses {used}"
        )
        if low <= used <= high or other == used:
            return f"{text}, which is about right."
        overrides = _overrides(config, nearest)
        return f"{text}; to try {other}, which is another run, add to the command:\n  {overrides}"


def _about(number: float) -> str:
    """Two digits of it: more are not known."""
    return f"{float(f'{number:.2g}'):g}"


def _nearest(layout: BatchLayout, batch: float, interval: tuple[float, float]) -> BatchLayout:
    """The layout of about so many images on as many processes.

    Of micro-batches as large as they are where that comes out within the interval, else of smaller ones.
    """
    micro, processes = layout.micro_batch_size, layout.num_processes
    steps = max(round(batch / (micro * processes)), 1)
    if not interval[0] <= micro * steps * processes <= interval[1]:
        steps = math.ceil(batch / (micro * processes)) or 1
        micro = max(round(batch / (steps * processes)), 1)
    return BatchLayout(micro, steps, processes)


def _overrides(config: Config, layout: BatchLayout) -> str:
    """Overrides of what the config gives of the batch, as they are typed into a shell."""
    training = config.training
    changes = {"output_dir": f"{config.output_dir.rstrip('/')}-batch-{layout.global_batch_size}"}
    if config.checkpoint.resume not in ("auto", "never"):
        changes["checkpoint.resume"] = "auto"  # a checkpoint of this run cannot start that one
    if training.global_batch_size is not None:
        changes["training.global_batch_size"] = str(layout.global_batch_size)
    if training.micro_batch_size not in (None, "auto", layout.micro_batch_size):
        changes["training.micro_batch_size"] = str(layout.micro_batch_size)
    if training.gradient_accumulation_steps not in (None, layout.gradient_accumulation_steps):
        changes["training.gradient_accumulation_steps"] = str(layout.gradient_accumulation_steps)
    return " ".join(shlex.quote(f"{key}={_yaml(value)}") for key, value in changes.items())


def _yaml(text: str) -> str:
    """The text as YAML: JSON's quotes, where it might be read as something else than text."""
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text, ensure_ascii=False)
