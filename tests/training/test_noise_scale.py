"""The gradient noise scale: its interval holds what it promises."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from finetune.training.metrics import Meters
from finetune.training.noise_scale import GradientNoiseScale


def test_both_means_and_their_scatter_by_hand():
    scale = GradientNoiseScale()
    # micro-batches of 1 in windows of 2: |G|^2 = (2 x 9 - 1 x 16) / (2 - 1) = 2, S = (16 - 9) / (1 - 1/2) = 14
    scale.add(16.0, 9.0, 1, 2)
    assert (scale.squared_gradient, scale.noise) == (2.0, 14.0)
    # |G|^2 = 2 x 7 - 10 = 4, S = (10 - 7) x 2 = 6; the second update weighs 4 / 5
    scale.add(10.0, 7.0, 1, 2)
    assert (scale.squared_gradient, scale.noise) == pytest.approx((0.2 * 2 + 0.8 * 4, 0.2 * 14 + 0.8 * 6))
    # the weighted variance of two values is 0.2 x 0.8 x their difference squared
    assert scale.scatter == pytest.approx([0.16 * 8 * 8, 0.16 * -8 * 2, 0.16 * 2 * 2])
    assert scale.squared_weights == pytest.approx(0.2**2 + 0.8**2)


def test_old_updates_are_forgotten():
    """Of n updates the k-th weighs 4 k (k+1) (k+2) / (n (n+1) (n+2) (n+3)), and the first half together
    (n/2 .. n/2+3) / (n .. n+3), about 1/16."""
    scale = GradientNoiseScale()
    for _ in range(100):
        scale.add(16.0, 9.0, 1, 2)  # S = 14, as above
    for _ in range(100):
        scale.add(10.0, 7.0, 1, 2)  # S = 6
    assert scale.noise == pytest.approx(6 + 8 * math.prod(range(100, 104)) / math.prod(range(200, 204)))
    k, n = np.arange(1, 201), 200
    weights = 4 * k * (k + 1) * (k + 2) / (n * (n + 1) * (n + 2) * (n + 3))
    assert scale.squared_weights == pytest.approx((weights**2).sum())


def test_the_interval_by_hand():
    """S = 30 with a standard error of 3 and |G|^2 = 2 known exactly, from 101 updates of equal weight: (30 +- 3 t) / 2
    with Student's t of 100 degrees of freedom, 1.984."""
    scale = GradientNoiseScale(2.0, 30.0, [9.0 * 100, 0.0, 0.0], squared_weights=1 / 101, updates=101)
    assert scale.interval == pytest.approx((15 - 1.5 * 1.984, 15 + 1.5 * 1.984), rel=1e-4)
    assert scale.value == 15.0


@given(st.floats(1, 100), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(-0.9, 0.9), st.integers(40, 500))
def test_at_its_ends_the_difference_is_t_standard_errors(noise, noise_error, gradient_error, correlation, updates):
    """|S - r |G|^2| = t se(S - r |G|^2), with |G|^2 = 1."""
    freedom = updates - 1
    noise_error *= noise
    covariance = [noise_error**2, correlation * noise_error * gradient_error, gradient_error**2]
    scale = GradientNoiseScale(1.0, noise, [freedom * value for value in covariance], 1 / updates, updates)
    t = 1.96 + 2.372 / freedom + 2.822 / freedom**2  # of Student's distribution
    if t * gradient_error >= 1:  # |G|^2 may as well be zero, and the noise scale anything
        assert scale.interval is None
        return
    low, high = scale.interval
    assert low <= noise <= high
    for end in {low, high} - {0.0}:
        squared_error = covariance[0] - 2 * end * covariance[1] + end**2 * covariance[2]
        assert abs(noise - end) == pytest.approx(t * math.sqrt(squared_error), rel=1e-6)


def gradients(runs: int, updates: int, dimensions: int, noise_scale: float, micro: int, layout: tuple[int, int]):
    """Squared norms of the gradient of a micro-batch and of a window, two arrays (runs, updates).

    |G|^2 = 1 and the noise has the same variance in each dimension, noise_scale in total; `layout` is accumulation
    steps x processes.
    """
    steps, processes = layout
    rng = np.random.default_rng(0)
    deviation = math.sqrt(noise_scale / dimensions / micro)
    means = deviation * rng.standard_normal((runs, updates, steps * processes, dimensions), np.float32)
    means[..., 0] += 1
    small = np.square(means[:, :, :processes]).sum(3).mean(2)  # the processes' first micro-batches, as in Window
    return small, np.square(means.mean(2)).sum(2)


@pytest.mark.parametrize(
    ("updates", "dimensions", "noise_scale", "micro", "layout"),
    [
        (40, 20, 45, 8, (8, 1)),
        (60, 50, 15, 16, (4, 1)),
        (60, 50, 5, 4, (2, 2)),
        (60, 50, 200, 8, (8, 1)),
        (300, 20, 45, 8, (4, 1)),
    ],
)
def test_the_interval_covers_the_truth_in_95_of_100_runs(updates, dimensions, noise_scale, micro, layout):
    """Of 500 runs 475 are expected, with a binomial standard deviation of sqrt(500 x 0.95 x 0.05) = 4.9. Four of them
    either way leave [456, 494]; standard errors that are a quarter too small or too large do not (86 % and 98.6 %)."""
    runs, covered = 500, 0
    small, big = gradients(runs, updates, dimensions, noise_scale, micro, layout)
    batch = micro * math.prod(layout)
    for norms in zip(small.tolist(), big.tolist(), strict=True):
        scale = GradientNoiseScale()
        for of_micro, of_window in zip(*norms, strict=True):
            scale.add(of_micro, of_window, micro, batch)
        low, high = scale.interval or (0, math.inf)
        covered += low <= noise_scale <= high
    assert 456 <= covered <= 493


def test_gradients_without_noise():
    scale = GradientNoiseScale()
    for _ in range(40):
        scale.add(4.0, 4.0, 8, 64)
    assert (scale.squared_gradient, scale.interval, scale.value) == (4.0, (0.0, 0.0), 0.0)


def test_nothing_is_said_of_a_few_updates():
    scale = GradientNoiseScale()
    for _ in range(39):
        scale.add(4.0, 4.0, 8, 64)
        assert scale.interval is scale.value is None


def test_meters_log_it_once_it_means_something():
    from finetune.training.window import WindowResult

    meters, rng = Meters(), np.random.default_rng(0)
    logged = []
    for _ in range(60):  # windows of 4 micro-batches of 8; |G|^2 = 1 and a noise of 30 in 50 dimensions
        means = rng.standard_normal((4, 50)) * math.sqrt(30 / 50 / 8)
        means[:, 0] += 1
        norms = np.linalg.norm(means.mean(0)), np.linalg.norm(means[0])
        result = WindowResult(np.ones(32), float(norms[0]), float(norms[1]), False, 8.0)
        scalars = meters.add_window(result, np.arange(32) * 30, 1000)
        logged.append(scalars.get("train/gradient_noise_scale"))
    assert logged[:39] == [None] * 39
    assert logged[-1] == meters.noise_scale.value == pytest.approx(30, rel=0.5)
    assert TypeAdapter(Meters).validate_python(json.loads(json.dumps(asdict(meters)))) == meters
