"""A loss that is not finite: the run stops before the update and names the images, or skips the update."""

import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.core.randomness import timesteps
from finetune.data.batches import Batches
from finetune.data.order import epoch_order
from finetune.run.recovery import SKIP_LIMIT
from finetune.run.run import Run
from finetune.training.window import Window
from harness.compare import differing, history, moments, run_state, unequal, valid_checkpoints, weights
from harness.faults import skip_the_export
from harness.processes import finish, run, run_two
from harness.undisturbed import command, undisturbed

IMAGES, BATCH, EPOCHS = 19, 8, 4  # windows of 8, 8 and 3: 12 updates
STEPS, BAD = 12, 5  # update 5 is the second of the second epoch: its positions 8 .. 15
RATE = 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it that was not disturbed."""
    return undisturbed(
        tmp_path_factory.mktemp("base"),
        IMAGES,
        training__num_epochs=EPOCHS,
        lr_scheduler={"name": "linear"},
        checkpoint={"every_steps": 1, "keep": STEPS},
        logging={"tracker": "tensorboard"},
    )


def settings(**training):
    return [f"training.{key}={value}" for key, value in training.items()]


def spoil(positions, epochs=(1,), value=np.nan):
    """The noise of the images at these positions is not finite, in these epochs."""
    skip_the_export()
    read = Batches.__getitems__

    def spoiling(batches, slots):
        batch = read(batches, slots)
        for place, slot in enumerate(slots):
            if slot.position in positions and slot.epoch in epochs:
                batch["noise"][place] = value
        return batch

    Batches.__getitems__ = spoiling


def culprits(positions, epoch=1):
    """As the message lists them: the images, and their timesteps."""
    images = epoch_order(3, epoch, IMAGES)[positions].tolist()  # the seed of tiny configs is 3
    return f"images {images} at timesteps {timesteps(3, epoch, positions, 100, 'stratified').tolist()}. "


def skipped_updates(run_dir):
    return [line.get("train/skipped_updates") for line in history(run_dir)]


# An infinite pixel becomes NaN in the network's first normalisation, so that the loss is NaN too.
@pytest.mark.parametrize(("positions", "value"), [([10], np.nan), ([9, 15], np.inf), ([8, 11, 12], np.nan)])
def test_stop_names_the_images_and_leaves_the_run_as_it_was(base, tmp_path, positions, value):
    run_dir = tmp_path / "run"
    ended = run(*command(base, run_dir), folder=tmp_path, before=lambda: spoil(positions, value=value))
    assert ended.returncode == 1
    assert ended.error.startswith(f"step {BAD}: found loss nan, gradient norm nan, expected finite ones; ")
    assert culprits(positions) in ended.error
    assert ended.error.endswith("or look at these images, or set training.nonfinite_loss=skip")
    assert f"expected finite ones; {len(positions)} of 8 losses are not finite, those of images" in ended.error
    assert valid_checkpoints(run_dir) == [1, 2, 3, 4]
    for part in ("model", "ema"):
        assert unequal(weights(run_dir, BAD - 1, part), weights(base / "run", BAD - 1, part)) == []
    assert [point["step"] for point in history(run_dir)] == [1, 2, 3, 4]
    finish(*command(base, run_dir), folder=tmp_path, before=skip_the_export)  # the cause is gone
    assert differing(base / "run", run_dir, STEPS) == []


def test_skip_leaves_out_the_update_and_counts_it(base, tmp_path):
    run_dir = tmp_path / "run"
    finish(*command(base, run_dir, *settings(nonfinite_loss="skip")), folder=tmp_path, before=lambda: spoil([10]))
    for part in ("model", "ema"):
        assert unequal(weights(run_dir, BAD, part), weights(run_dir, BAD - 1, part)) == []
        assert unequal(weights(run_dir, BAD + 1, part), weights(run_dir, BAD, part)) != []
    after, before = moments(run_dir, BAD), moments(run_dir, BAD - 1)
    assert [name for name in before if unequal(after[name], before[name])] == []
    lines = history(run_dir)
    applied_before = [step - 1 if step <= BAD else step - 2 for step in range(1, STEPS + 1)]
    rates = [RATE * (1 - applied / STEPS) for applied in applied_before]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-12)
    assert skipped_updates(run_dir) == [None] * (BAD - 1) + [1] * (STEPS - BAD + 1)
    assert "train/loss" not in lines[BAD - 1]
    # The second epoch's mean is over its windows of 8 and 3 images, without the 8 of the skipped one.
    totals = [lines[3]["train/loss"] * 8, lines[5]["train/loss"] * 3]
    assert lines[5]["train/epoch_loss"] == pytest.approx(sum(totals) / 11, rel=1e-12)
    state = run_state(run_dir, STEPS)["state"]
    assert (state["skipped"], state["skipped_in_a_row"]) == (1, 0)


def test_skip_ends_the_run_after_a_limit(base, tmp_path):
    run_dir = tmp_path / "run"
    arguments = command(base, run_dir, *settings(nonfinite_loss="skip", num_epochs=20))
    everything = range(IMAGES), range(1, 20)  # from the second epoch on
    ended = run(*arguments, "checkpoint.every_steps=10", folder=tmp_path, before=lambda: spoil(*everything))
    assert ended.returncode == 1
    # Updates 1 to 3 are applied, the next 25 skipped.
    assert SKIP_LIMIT == 25
    assert ended.error.startswith("step 29: found loss nan, gradient norm nan, 26 updates in a row, expected finite ")
    assert valid_checkpoints(run_dir) == [10, 20]
    assert unequal(weights(run_dir, 10), weights(run_dir, 20)) == []


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("reaction", ["stop", "skip"])
def test_both_processes_react_if_one_of_them_finds_it(base, tmp_path, process, reaction):
    # Micro-batches of 4 are dealt in turn: of positions 8 .. 15, process 0 has the first four.
    run_dir, place = tmp_path / "run", 8 + 4 * process + 2

    def before(number):
        skip_the_export()
        if number == process:
            spoil([place])

    arguments = command(base, run_dir, *settings(nonfinite_loss=reaction, gradient_accumulation_steps=1))
    main, other = run_two(*arguments, folder=tmp_path, before=before)
    if reaction == "stop":
        assert [main.returncode, other.returncode] == [1, 1]
        assert culprits([place]) in main.error
        assert "Traceback" not in other.stderr
        assert other.errors == []
        assert valid_checkpoints(run_dir) == [1, 2, 3, 4]
    else:
        assert [main.returncode, other.returncode] == [0, 0], main.stderr + other.stderr
        assert unequal(weights(run_dir, BAD), weights(run_dir, BAD - 1)) == []
        assert unequal(weights(run_dir, BAD + 1), weights(run_dir, BAD)) != []
        assert skipped_updates(run_dir) == [None] * 4 + [1] * 8


@pytest.mark.parametrize("accumulation_steps", [1, 2, 8])
def test_the_check_costs_one_synchronisation_an_update(base, tmp_path, accumulation_steps):
    """Whatever fetches numbers from the device is noted, from the first micro-step to the last update's end."""
    noted_file, micro = tmp_path / "noted.json", BATCH // accumulation_steps

    def before():
        skip_the_export()
        noted = []

        class Fetches(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                if function is torch.ops.aten._local_scalar_dense.default:  # item(), bool(), float(), int()
                    noted.append("item")
                return function(*arguments, **(keywords or {}))

        def note(owner, name):
            function = getattr(owner, name)
            setattr(owner, name, lambda *given, **more: noted.append(name) or function(*given, **more))

        for owner, *names in ((torch.Tensor, "cpu", "numpy", "tolist"), (Window, "add")):
            for name in names:
                note(owner, name)
        end = Run.finish

        def finishing(run, flops):
            noted_file.write_text(json.dumps(noted))
            return end(run, flops)

        Run.finish = finishing
        Fetches().__enter__()

    sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation_steps, "num_epochs": 1}
    arguments = command(base, tmp_path / "run", *settings(**sizes))
    options = "checkpoint.every_steps=1000", "logging.tracker=null", "data.num_workers=1"
    finish(*arguments, *options, folder=tmp_path, before=before)
    noted = json.loads(noted_file.read_text())
    windows = [["add"] * -(-images // micro) + ["cpu", "numpy"] for images in (8, 8, 3)]
    assert noted[noted.index("add") :] == [*windows[0], *windows[1], *windows[2]]
