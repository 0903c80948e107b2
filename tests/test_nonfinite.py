"""A loss that is not finite touches nothing: the run stops and names the culprits, or leaves the update out."""

import json
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trouble import said, script, two, whole

import train
from finetune.data import Batches
from finetune.randomness import timestep
from finetune.run import SKIP_LIMIT, Run
from finetune.windows import epoch_order
from tiny import differing, history, run_here, tiny_config, weights, write_config, write_pictures

IMAGES, BATCH, EPOCHS = 19, 8, 4  # windows of 8, 8 and 3: 12 updates
STEPS, BAD = 12, 5  # update 5 is the second of the second epoch: its positions 8 .. 15
RATE = 1e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it that was not disturbed."""
    base = tmp_path_factory.mktemp("base")
    config = tiny_config(
        write_pictures(base / "pictures", IMAGES),
        base / "run",
        training__num_epochs=EPOCHS,
        lr_scheduler={"name": "linear"},
        checkpoint={"every_steps": 1, "keep": STEPS},
        logging={"tracker": "tensorboard"},
    )
    write_config(base / "config.yaml", config)
    assert script("--config", base / "config.yaml", folder=base).returncode == 0
    return base


def spoil(positions, epochs=(1,), value=np.nan):
    """The loss of the images at these positions is not finite, in these epochs."""
    read = Batches.__getitems__

    def spoiling(batches, slots):
        batch = read(batches, slots)
        for place, slot in enumerate(slots):
            if slot.position in positions and slot.epoch in epochs:
                batch["noise"][place] = value
        return batch

    Batches.__getitems__ = spoiling


def culprits(positions, epoch=1):
    """As a message lists them: the images, and their timesteps."""
    images = epoch_order(3, epoch, IMAGES)[positions].tolist()  # the seed of tiny configs is 3
    return f"images {images} at timesteps {[timestep(3, epoch, place, 100, 'stratified') for place in positions]}. "


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("positions", "value"), [([10], np.nan), ([9, 15], np.inf), ([8, 11, 12], np.nan)])
def test_stop_names_the_culprits_and_updates_nothing(base, tmp_path, positions, value):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}")
    line = said(script(*arguments, folder=tmp_path, before=lambda: spoil(positions, value=value)), 1)
    assert re.match(rf"step {BAD}: found loss (nan|inf), gradient norm nan, expected finite ones; ", line)
    assert culprits(positions) in line
    assert line.endswith("look at these images, or set training.nonfinite_loss=skip")
    assert whole(run) == [1, 2, 3, 4]
    for part in ("model", "ema"):
        assert same(weights(run, BAD - 1, part), weights(base / "run", BAD - 1, part))
    assert [point["step"] for point in history(run)] == [1, 2, 3, 4]
    assert script(*arguments, folder=tmp_path).returncode == 0  # the cause is gone, and nothing else is
    assert differing(base / "run", run, STEPS) == []


def test_skip_drops_the_update_and_counts_it(base, tmp_path):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "training.nonfinite_loss=skip")
    skipped = script(*arguments, folder=tmp_path, before=lambda: spoil([10]))
    assert skipped.returncode == 0, skipped.stderr
    for part in ("model", "ema"):
        assert same(weights(run, BAD, part), weights(run, BAD - 1, part))
        assert not same(weights(run, BAD + 1, part), weights(run, BAD, part))
    moments = [torch.load(run / f"checkpoint-{step}/optimizer.bin", weights_only=True)["state"] for step in (4, 5)]
    assert all(same(moments[0][key], moments[1][key]) for key in moments[0])
    lines = history(run)
    updates = [step if step < BAD else step - 1 for step in range(1, STEPS + 1)]
    rates = [RATE * (1 - (update - (step != BAD)) / STEPS) for step, update in enumerate(updates, 1)]
    assert [line["train/learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-12)
    assert [line.get("train/skipped_updates") for line in lines] == [None] * (BAD - 1) + [1] * (STEPS - BAD + 1)
    assert "train/loss" not in lines[BAD - 1]
    # 19 images of the epoch but for the 8 that were left out.
    means = [line["train/loss"] * count for line, count in zip(lines[3:6:2], (8, 3), strict=True)]
    assert lines[5]["train/epoch_loss"] == pytest.approx(sum(means) / 11, rel=1e-12)
    state = json.loads((run / f"checkpoint-{STEPS}/run_state.json").read_text())["state"]
    assert (state["skipped"], state["skipped_in_a_row"]) == (1, 0)


def test_skip_gives_up_after_a_limit(base, tmp_path):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "training.nonfinite_loss=skip")
    arguments += ("training.num_epochs=20", "checkpoint.every_steps=10")
    line = said(script(*arguments, folder=tmp_path, before=lambda: spoil(range(BATCH * 3), range(1, 20))), 1)
    # Updates 1 to 3 are good; of those after them the first 25 are left out.
    assert line.startswith(f"step {3 + SKIP_LIMIT + 1}: found loss nan, gradient norm nan, 26 updates in a row, ")
    assert whole(run) == [10, 20]
    assert same(weights(run, 10), weights(run, 20))


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("reaction", ["stop", "skip"])
def test_one_of_two_processes_meets_it(base, tmp_path, process, reaction):
    run, place = tmp_path / "run", 8 + 2 + 4 * process  # with micro-batches of 4, runs of 4 are dealt out in turn
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", f"training.nonfinite_loss={reaction}")
    arguments += ("training.gradient_accumulation_steps=1",)

    def before(number):
        if number == process:
            spoil([place])

    outcomes = [each.wait() for each in two(*arguments, folder=tmp_path, before=before)]
    if reaction == "stop":
        assert [outcome.returncode for outcome in outcomes] == [1, 1], outcomes
        assert "Traceback" not in outcomes[1].stderr
        assert outcomes[1].errors == []
        assert culprits([place]) in said(outcomes[0], 1)
        assert whole(run) == [1, 2, 3, 4]
    else:
        assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
        assert same(weights(run, BAD), weights(run, BAD - 1))
        assert not same(weights(run, BAD + 1), weights(run, BAD))
        assert [line.get("train/skipped_updates") for line in history(run)] == [None] * 4 + [1] * 8


@pytest.mark.parametrize("accumulation_steps", [1, 2, 8])
def test_looking_costs_one_synchronisation_an_update(base, tmp_path, monkeypatch, accumulation_steps):
    """Whatever fetches numbers from the device is noted, from the first micro-step to the last update's end."""
    noted = []

    class Fetches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten._local_scalar_dense.default:  # item(), bool(), float(), int()
                noted.append("item")
            return function(*arguments, **(keywords or {}))

    def note(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: noted.append(name) or function(*given, **more))

    for owner, *names in ((torch.Tensor, "cpu", "numpy", "tolist"), (train.Window, "add"), (Run, "finish")):
        for name in names:
            note(owner, name)
    micro = BATCH // accumulation_steps
    config = tiny_config(base / "pictures", tmp_path / "run", data__num_workers=1, training__num_epochs=1)
    config["training"] |= {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation_steps}
    with Fetches():
        assert run_here(config, tmp_path / "config.yaml") == 0
    windows = [["add"] * -(-images // micro) + ["cpu", "numpy"] for images in (8, 8, 3)]
    assert noted[noted.index("add") : noted.index("finish")] == [*windows[0], *windows[1], *windows[2]]
