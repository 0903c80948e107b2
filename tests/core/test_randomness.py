"""Draws are functions of their key, and distributed as they should be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.randomness import noise, timestep, uniform


def test_noise_is_a_function_of_its_key_alone():
    before = torch.get_rng_state()
    first = noise(1, 2, 3, (1, 4, 4))
    torch.manual_seed(99)
    assert torch.equal(first, noise(1, 2, 3, (1, 4, 4)))
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(first, noise(*other, (1, 4, 4)))
    assert not torch.equal(first, noise(1, 2, 3, (1, 4, 4), purpose="validation"))
    torch.set_rng_state(before)
    noise(1, 2, 3, (1, 4, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_standard_normal():
    draws = torch.stack([noise(0, 0, position, (64,)) for position in range(1000)])
    # 64,000 draws: the mean has a standard error of 0.004, the standard deviation one of 0.003
    assert abs(draws.mean()) < 0.016
    assert abs(draws.std() - 1) < 0.012


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
def test_each_timestep_is_equally_likely(sampling):
    steps, epochs, positions = 10, 200, 50
    drawn = [timestep(0, epoch, place, steps, sampling) for epoch in range(epochs) for place in range(positions)]
    counts = np.bincount(drawn, minlength=steps)
    # 1,000 each expected, standard deviation at most 30 (sqrt(10000 x 0.1 x 0.9)); five of them
    assert counts.sum() == epochs * positions
    assert np.abs(counts - 1000).max() < 150


@given(start=st.integers(0, 10**9), length=st.integers(1, 200), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_stratified_runs_cover_the_range_evenly_at_any_length(start, length, seed, epoch):
    steps = 10**6
    drawn = np.sort([timestep(seed, epoch, start + i, steps, "stratified") for i in range(length)]) / steps
    # The multiples of the golden ratio: a run of n points leaves no gap on the circle above 2.62 / n (phi^2) and none
    # under 0.38 / n (1 / phi^2), the three-distance theorem's bounds.
    gaps = np.diff(np.append(drawn, drawn[0] + 1))
    assert gaps.max() <= 2.62 / length + 1e-5
    if length > 1:
        assert gaps.min() >= 0.38 / length - 1e-5


def test_independent_draws_do_not_cover_evenly():
    drawn = np.sort([timestep(0, 0, i, 10**6, "uniform") for i in range(200)]) / 10**6
    assert np.diff(drawn).max() > 2.62 / 200


def test_uniform_draws():
    draws = np.array([uniform(0, "flip", 0, position, 2) for position in range(5000)])
    assert draws.shape == (5000, 2)
    assert 0 <= draws.min() < draws.max() < 1
    # standard error of a mean of 5,000: 0.0041; of the correlation: 0.014
    assert np.abs(draws.mean(0) - 0.5).max() < 0.017
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.057
    assert uniform(0, "flip", 0, 1, 2) != uniform(0, "crop", 0, 1, 2)
