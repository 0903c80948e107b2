"""Draws are functions of their key, and distributed as they should be."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.randomness import conditions_dropped, draws, noise, timesteps, uniform


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
    drawn = np.concatenate([timesteps(0, epoch, range(positions), steps, sampling) for epoch in range(epochs)])
    counts = np.bincount(drawn, minlength=steps)
    # 1,000 each expected, standard deviation at most 30 (sqrt(10000 x 0.1 x 0.9)); five of them
    assert counts.sum() == epochs * positions
    assert np.abs(counts - 1000).max() < 150


@given(start=st.integers(0, 10**9), length=st.integers(1, 200), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_stratified_runs_cover_the_range_evenly_at_any_length(start, length, seed, epoch):
    steps = 10**6
    drawn = np.sort(timesteps(seed, epoch, range(start, start + length), steps, "stratified")) / steps
    # The multiples of the golden ratio: a run of n points leaves no gap on the circle above 2.62 / n (phi^2) and none
    # under 0.38 / n (1 / phi^2), the three-distance theorem's bounds.
    gaps = np.diff(np.append(drawn, drawn[0] + 1))
    assert gaps.max() <= 2.62 / length + 1e-5
    if length > 1:
        assert gaps.min() >= 0.38 / length - 1e-5


def test_independent_draws_do_not_cover_evenly():
    drawn = np.sort(timesteps(0, 0, range(200), 10**6, "uniform")) / 10**6
    assert np.diff(drawn).max() > 2.62 / 200


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    places=st.lists(st.integers(0, 10**12), max_size=20),
    steps=st.integers(1, 10**6),
)
def test_draws_of_many_positions_are_those_of_each_to_the_bit(seed, epoch, places, steps):
    def hashed(purpose, place):
        digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{place}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53

    offset = hashed("timesteps", 0)
    stratified = [int(steps * ((offset + place * 0.6180339887) % 1.0)) for place in places]
    assert timesteps(seed, epoch, places, steps, "stratified").tolist() == stratified
    independent = [hashed("timestep", place) for place in places]
    assert draws(seed, "timestep", epoch, places).tolist() == independent
    assert [uniform(seed, "timestep", epoch, place, 1)[0] for place in places] == independent
    drawn = timesteps(seed, epoch, np.array(places, dtype=np.int64), steps, "uniform")
    assert drawn.tolist() == [int(steps * fraction) for fraction in independent]
    dropped = conditions_dropped(seed, epoch, places, 0.3)
    assert dropped.tolist() == [hashed("condition dropout", place) < 0.3 for place in places]


def test_uniform_draws():
    draws = np.array([uniform(0, "flip", 0, position, 2) for position in range(5000)])
    assert draws.shape == (5000, 2)
    assert 0 <= draws.min() < draws.max() < 1
    # standard error of a mean of 5,000: 0.0041; of the correlation: 0.014
    assert np.abs(draws.mean(0) - 0.5).max() < 0.017
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.057
    assert uniform(0, "flip", 0, 1, 2) != uniform(0, "crop", 0, 1, 2)
