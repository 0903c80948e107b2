"""What makes a run independent of its batch layout, broken piece by piece: each time layouts have to come apart.

19 images in windows of 8 make updates of 8, 8 and 3 images: a fault of the last window alone shows in the third update
alone. `train/grad_norm` is the norm of the whole gradient, before clipping.
"""

import pytest

from harness.compare import history, relative_difference, weights
from harness.configs import of_kind, tiny_config, write_config, write_pictures
from harness.faults import skip_the_export
from harness.processes import finish, run_two

UPDATES = 3  # of an epoch
SAME, APART = 1e-5, 1e-3  # relative differences
WHOLE, PAIRS, SINGLE = (8, 1), (2, 4), (1, 8)  # micro-batch, accumulation steps


KINDS = ["unconditional", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("classes", "text", "lora"))]


@pytest.fixture(scope="module", params=KINDS)
def config_file(request, tmp_path_factory):
    base, kind = tmp_path_factory.mktemp("base"), request.param
    pictures = write_pictures(base / "pictures", 19, kind=kind)
    config = tiny_config(pictures, base / "run", **of_kind(kind, pictures, whole=True) | {"training__num_epochs": 1})
    return write_config(base / "config.yaml", config)


@pytest.fixture
def compare(config_file, tmp_path):
    """Ratios of the gradient norms, update by update, of one layout to another; and how far apart the weights end."""

    def compared(one, other, fault=lambda: None, epochs=1):
        def before():
            skip_the_export()
            fault()

        runs = []
        for micro, steps in (one, other):
            runs.append(tmp_path / f"{micro}x{steps}")
            sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": steps, "num_epochs": epochs}
            overrides = [f"output_dir={runs[-1]}", *(f"training.{key}={value}" for key, value in sizes.items())]
            finish("--config", config_file, *overrides, folder=tmp_path, before=before)
        norms = [[line["train/grad_norm"] for line in history(folder)] for folder in runs]
        ratios = [first / second for first, second in zip(*norms, strict=True)]
        assert len(ratios) == UPDATES * epochs
        return ratios, relative_difference(*(weights(folder, UPDATES * epochs) for folder in runs))

    return compared


def together(ratios):
    """Of each update, whether its gradients have the same norm."""
    return [abs(ratio - 1) < SAME for ratio in ratios]


@pytest.mark.parametrize("layout", [PAIRS, SINGLE])
def test_layouts_agree_as_long_as_nothing_is_broken(compare, layout):
    ratios, apart = compare(WHOLE, layout)
    assert together(ratios) == [True, True, True]
    assert apart < SAME


def test_the_mean_of_each_micro_batch_makes_the_last_gradient_too_small(compare):
    """The usual mistake: the loss is a micro-batch's mean, which Accelerate divides by N in a shorter window too.

    Of single images, the last window has 3 of the 8 micro-steps that it is divided by: 3/8 of its mean.
    """

    def fault():
        from finetune.data import order

        deal = order.deal

        def means(*arguments):
            for micro_batch in deal(*arguments):
                real = sum(slot.weight > 0 for slot in micro_batch)
                yield [slot._replace(weight=1 / real if slot.weight else 0.0) for slot in micro_batch]

        order.deal = means

    ratios, _ = compare(SINGLE, WHOLE, fault)
    assert ratios == pytest.approx([1, 1, 3 / 8], rel=SAME)


def test_padding_that_counts_pulls_layouts_apart_in_the_last_update(compare):
    """The first image fills up the window: 6 times among 8 in one micro-batch, twice among 4 in two pairs."""

    def fault():
        from finetune.data import order

        deal = order.deal

        def padded(*arguments):
            for micro_batch in deal(*arguments):
                weight = max(slot.weight for slot in micro_batch)
                yield [slot._replace(weight=weight) for slot in micro_batch]

        order.deal = padded

    ratios, apart = compare(WHOLE, PAIRS, fault)
    assert together(ratios) == [True, True, False]
    assert abs(ratios[2] - 1) > APART
    assert apart > SAME


def test_noise_from_the_global_generator_pulls_layouts_apart_after_the_first_padding(compare):
    """Padding draws as well: 5 times in one micro-batch of 8, once in two pairs. The second epoch's noise differs."""

    def fault():
        import torch

        from finetune.core import randomness

        torch.manual_seed(0)
        keyed = randomness.noise
        randomness.noise = lambda *key: torch.randn(key[3]) if len(key) == 4 else keyed(*key)  # 5: another purpose

    ratios, apart = compare(WHOLE, PAIRS, fault, epochs=2)
    assert together(ratios) == [True, True, True, False, False, False]
    assert apart > APART


def test_timesteps_by_the_place_in_the_micro_batch_pull_layouts_apart(compare):
    def fault():
        from finetune.data.batches import Batches

        read = Batches.__getitems__

        def by_place(batches, slots):
            batch = read(batches, slots)
            batch["timesteps"] = 10 * batch["timesteps"].new_tensor(range(len(slots)))
            return batch

        Batches.__getitems__ = by_place

    ratios, apart = compare(WHOLE, PAIRS, fault)
    assert together(ratios) == [False, False, False]
    assert apart > APART


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reduced", "equal_at_the_end_alone"),
    [((), "12 12", "True True"), (("--unprepared",), "12 48", "True False")],
    ids=["prepared", "bare"],
)
def test_gradients_are_reduced_once_an_update_if_accumulate_is_on_the_prepared_network(
    tmp_path, flags, reduced, equal_at_the_end_alone
):
    """Twelve updates of N = 1 and then of N = 4 micro-steps, on two processes; the gradients fill one bucket.

    On the bare network every micro-step reduces: 12 x 4.
    """
    first, other = run_two(*flags, folder=tmp_path, script="tests/harness/all_reduces.py")
    assert [first.returncode, other.returncode] == [0, 0], first.stderr[-2000:]
    assert f"all-reduces: {reduced}\n" in first.stdout
    assert f"gradients equal at a window's end alone: {equal_at_the_end_alone}\n" in first.stdout
