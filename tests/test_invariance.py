"""One run, however it is split: over micro-batches, accumulation steps and processes, in every precision."""

import pytest

from splits import EPOCHS, SPLITS, TAILS, Case, differences, every_case, run_cases, slots
from tiny import history

# float32 goes through every split of every tail; the others meet each split and each tail once
FULL = every_case("float32")
ONCE = [*zip(SPLITS[8][1:], TAILS[8], strict=True), *((split, 19) for split in SPLITS[12][1:])]
BOUNDS = {"float32": 1e-5, "float64": 1e-12}

# bf16 keeps 8 significant bits: each number a layer hands on is off by up to 2^-8 of itself. A prediction p(1 + d),
# |d| <= 2^-8, changes the loss L = mean (p - y)^2 by up to 2 mean |d p (p - y)| <= 2 x 2^-8 rms(p) sqrt(L), and with
# rms(p) <= sqrt(L), as in a network at its start, L by 2^-7 of itself: one unit of bf16's last place.
BF16 = 2**-7


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    once = [Case(precision, *case) for precision in ("float64", "bf16") for case in ONCE]
    return run_cases(tmp_path_factory.mktemp("invariance"), FULL + once)


def same_images(runs, case):
    """The same images, pixels, noise and timesteps, to the bit."""
    assert len(slots(runs[case.reference])) == EPOCHS * case.images
    assert slots(runs[case]) == slots(runs[case.reference])


@pytest.mark.parametrize("case", [*FULL, *(Case("float64", *case) for case in ONCE)], ids=str)
def test_every_split_is_the_same_run(runs, case):
    same_images(runs, case)
    lines = history(runs[case])
    assert [line["step"] for line in lines] == list(range(1, case.updates + 1))
    assert sum("train/epoch_loss" in line for line in lines) == EPOCHS
    found = differences(runs[case.reference], runs[case], case.updates)
    assert {name: apart for name, apart in found.items() if apart > BOUNDS[case.precision]} == {}


@pytest.mark.parametrize("case", [Case("bf16", *case) for case in ONCE], ids=str)
def test_in_bf16_the_losses_agree_within_its_resolution(runs, case):
    same_images(runs, case)
    found = differences(runs[case.reference], runs[case], case.updates)
    assert found["train/loss"] < BF16
    assert found["train/epoch_loss"] < BF16
    assert found["train/learning_rate"] == 0
    # and it was bf16: float32 is further away than another split of the same
    in_float32 = differences(runs[case.reference._replace(precision="float32")], runs[case.reference], case.updates)
    assert in_float32["train/loss"] > 1e-5


def test_the_runs_did_train(runs):
    output_dir = runs[Case("float32", (1, 8, 1), 19)]
    lines = [line["train/epoch_loss"] for line in history(output_dir) if "train/epoch_loss" in line]
    assert lines[-1] < 0.95 * lines[0]
