"""What makes one run of many splits, taken away piece by piece: each time the comparison has to fail."""

import pytest
import torch

from finetune import data, randomness, windows
from splits import relative_difference
from tiny import launch, run_here, tiny_config, weights, write_pictures

STEPS = 3  # 19 images in windows of 8: 8 + 8 + 3


def two_splits(folder):
    """How far apart 8 x 1 and 2 x 4 end."""
    pictures = write_pictures(folder / "pictures", 19)
    for micro, steps in ((8, 1), (2, 4)):
        config = tiny_config(
            pictures,
            folder / str(micro),
            training__micro_batch_size=micro,
            training__gradient_accumulation_steps=steps,
            training__num_epochs=1,
        )
        assert run_here(config, folder / "config.yaml") == 0
    return relative_difference(weights(folder / "8", STEPS), weights(folder / "2", STEPS))


def test_as_it_is(tmp_path):
    assert two_splits(tmp_path) < 1e-5


def test_without_the_weight_of_the_tail(tmp_path, monkeypatch):
    deal = windows.deal

    def unweighted(images, epoch, positions, split):
        for run in deal(images, epoch, positions, split):
            real = sum(slot.weight > 0 for slot in run)  # the mean over each micro-batch, as everyone takes it
            yield [slot._replace(weight=1 / real if slot.weight else 0.0) for slot in run]

    monkeypatch.setattr(windows, "deal", unweighted)
    assert two_splits(tmp_path) > 1e-4


def test_with_noise_from_the_global_generator(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(data.randomness, "noise", lambda seed, epoch, position, shape: torch.randn(shape))
    assert two_splits(tmp_path) > 1e-4


def test_with_padding_that_counts(tmp_path, monkeypatch):
    deal = windows.deal

    def padded(images, epoch, positions, split):
        for run in deal(images, epoch, positions, split):
            yield [slot._replace(weight=max(slot.weight, run[0].weight)) for slot in run]

    monkeypatch.setattr(windows, "deal", padded)
    assert two_splits(tmp_path) > 1e-4


def test_with_timesteps_that_depend_on_the_place_in_the_batch(tmp_path, monkeypatch):
    timestep = randomness.timestep
    monkeypatch.setattr(
        data.randomness, "timestep", lambda seed, epoch, position, *rest: timestep(seed, epoch, position % 2, *rest)
    )
    assert two_splits(tmp_path) < 1e-5  # still a function of the position, and so still one run
    calls = []
    monkeypatch.setattr(
        data.randomness, "timestep", lambda seed, epoch, position, *rest: calls.append(1) or len(calls) % 100
    )
    (tmp_path / "again").mkdir()
    assert two_splits(tmp_path / "again") > 1e-4


@pytest.mark.parametrize(("unprepared", "expected"), [(False, "12 12"), (True, "12 48")])
def test_one_set_of_all_reduces_an_update(unprepared, expected):
    """Counted by a communication hook on two processes: N = 1 and N = 4, twelve updates each, one bucket."""
    flags = ["--unprepared"] if unprepared else []
    outcome = launch(*flags, processes=2, script="tests/reduces.py")
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert f"reduces: {expected}" in outcome.stdout
    assert "apart inside a window, together at its end: True" in outcome.stdout
