"""One run in every batch layout: over micro-batches, accumulation steps and processes, in every precision."""

import pytest

from harness.compare import differences, history, slots
from harness.layouts import LAYOUTS, TAILS, Case, every_case, run_cases

pytestmark = pytest.mark.slow

# float32 goes through every layout of every tail; the other precisions meet each layout and each tail once.
FULL = every_case("float32")
ONCE = [*zip(LAYOUTS[8][1:], TAILS[8], strict=True), *((layout, 19) for layout in LAYOUTS[12][1:])]
BOUNDS = {"float32": 1e-5, "float64": 1e-12}

# bf16 keeps 8 significant bits: each number a layer hands on is off by up to 2^-8 of itself. A prediction p(1 + d),
# |d| <= 2^-8, changes the loss L = mean (p - y)^2 by up to 2 mean |d p (p - y)| <= 2 x 2^-8 rms(p) sqrt(L), and with
# rms(p) <= sqrt(L), as in a network at its start, L by 2^-7 of itself: one unit of bf16's last place.
BF16 = 2**-7


# The other kinds meet them in float64, whose bound is the closer one, and in float32 one layout.
KINDS = [Case("float64", *case, kind) for case in ONCE for kind in ("unconditional", "classes", "text", "lora")]
KINDS += [Case("float64", layout, 19, "sdxl") for layout in LAYOUTS[12][1:]]
KINDS += [Case("float32", (2, 3, 2), 19, kind) for kind in ("classes", "text")]
# Random crops of latents are encoded in float32 whatever the network's precision, in batches that the layout decides.
CROPS = [Case("float32", *case, "text", crop="random") for case in ONCE]
CROPS += [Case("float32", (2, 3, 2), 19, kind, crop="random") for kind in ("sdxl", "lora")]
CROPS += [Case("float32", (2, 2, 2), 17, "text", shard=True, crop="random")]
SHARDED = [
    Case("float64", layout, images, kind, shard=True)
    for kind in ("unconditional", "classes", "text")
    for layout, images in (((2, 2, 2), 17), ((2, 3, 2), 19))
]
SHARDED += [Case("float32", (2, 2, 2), 17, shard=True)]
EXACT = FULL + KINDS + CROPS + SHARDED
IN_BF16 = [*(Case("bf16", *case) for case in ONCE), Case("bf16", (2, 2, 2), 17, shard=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("invariance"), EXACT + IN_BF16)


def assert_same_images(runs, case):
    """The same images, pixels, noise, timesteps and conditions, to the bit."""
    assert len(slots(runs[case.reference])) == case.epochs * case.images
    assert slots(runs[case]) == slots(runs[case.reference])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_every_layout_is_the_same_run(runs, case):
    assert_same_images(runs, case)
    lines = history(runs[case])
    assert [line["step"] for line in lines] == list(range(1, case.updates + 1))
    assert sum("train/epoch_loss" in line for line in lines) == case.epochs
    found = differences(runs[case.reference], runs[case], case.updates)
    assert {name: apart for name, apart in found.items() if apart > BOUNDS[case.precision]} == {}


@pytest.mark.parametrize("case", IN_BF16, ids=str)
def test_in_bf16_the_losses_agree_within_its_resolution(runs, case):
    assert_same_images(runs, case)
    found = differences(runs[case.reference], runs[case], case.updates)
    assert found["train/loss"] < BF16
    assert found["train/epoch_loss"] < BF16
    assert found["train/learning_rate"] == 0
    # and it was bf16: float32 is further away than another layout of the same
    in_float32 = differences(runs[case.reference._replace(precision="float32")], runs[case.reference], case.updates)
    assert in_float32["train/loss"] > 1e-5


def test_a_compiled_run_is_the_uncompiled_run(tmp_path):
    """By the backend that compiles in seconds; what inductor makes is compared in test_soundness."""
    case = Case("compiled", (1, 2, 4), 19)
    runs = run_cases(tmp_path, [case], "aot_eager")
    assert_same_images(runs, case)
    found = differences(runs[case.reference], runs[case], case.updates)
    assert {name: apart for name, apart in found.items() if apart > BOUNDS["float32"]} == {}


def test_the_runs_that_are_compared_did_train(runs):
    output_dir = runs[Case("float32", (1, 8, 1), 19)]
    losses = [line["train/epoch_loss"] for line in history(output_dir) if "train/epoch_loss" in line]
    assert losses[-1] < 0.95 * losses[0]
