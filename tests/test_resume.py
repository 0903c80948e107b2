"""Going on where a run was: to the bit on the same set-up, within rounding on another, and by a seek."""

import numpy as np
import pytest
import torch

from finetune.config import load_config
from finetune.data import Batches, make_loader
from finetune.windows import Split, WindowSampler
from splits import moments, relative_difference
from tiny import (
    history,
    launch,
    let_run,
    run_here,
    stop_after_updates,
    tiny_config,
    weights,
    write_config,
    write_pictures,
)

STEPS = 6  # 19 images in windows of 8: 8 + 8 + 3, twice


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 19, (10, 8))


def lively(pictures, output_dir, **changes):
    """Everything that could go astray: crops, flips, a schedule, warm-up, averaging, a tail."""
    changes = {
        "data__crop": "random",
        "data__random_flip": True,
        "lr_scheduler": {"name": "cosine", "warmup_steps": 2},
        **changes,
    }
    return tiny_config(pictures, output_dir, **changes)


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    base = tmp_path_factory.mktemp("undisturbed")
    assert run_here(lively(pictures, base / "run"), base / "config.yaml") == 0
    return base / "run"


def same_to_the_bit(one, other):
    for part in ("model", "ema"):
        expected, found = weights(one, STEPS, part), weights(other, STEPS, part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), part
    for kind in ("exp_avg", "exp_avg_sq"):
        expected, found = moments(one, STEPS, kind), moments(other, STEPS, kind)
        assert all(torch.equal(expected[name], found[name]) for name in expected), kind
    timed = ("train/images_per_second", "time/")
    curves = [
        [{key: value for key, value in line.items() if not key.startswith(timed)} for line in history(run)]
        for run in (one, other)
    ]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(("stops", "workers"), [*(((step,), 0) for step in range(1, STEPS)), ((2, 2, 1), 0), ((4,), 2)])
def test_a_stopped_run_goes_on_to_the_bit(pictures, undisturbed, tmp_path, stops, workers):
    config = lively(pictures, tmp_path / "run", data__num_workers=workers)
    for updates in stops:
        stop_after_updates(updates)
        try:
            assert run_here(config, tmp_path / "config.yaml") == 143
        finally:
            let_run()
    assert (tmp_path / "run" / f"checkpoint-{sum(stops)}").is_dir()
    assert run_here(config, tmp_path / "config.yaml") == 0
    same_to_the_bit(undisturbed, tmp_path / "run")


def test_a_run_goes_on_with_other_processes_and_another_micro_batch(pictures, undisturbed, tmp_path):
    """1 process x 4 x 2, then 2 x 2 x 2, then 1 x 1 x 8."""
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    for flags, processes, micro, steps in (
        (["--stop-after", "2"], 1, 4, 2),
        (["--stop-after", "2"], 2, 2, 2),
        ([], 1, 1, 8),
    ):
        config = lively(pictures, run, training__micro_batch_size=micro, training__gradient_accumulation_steps=steps)
        outcome = launch(*flags, write_config(file, config), processes=processes, script="tests/several.py")
        assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert f"Going on from {run / 'checkpoint-4'}" in outcome.stdout
    for part in ("model", "ema"):
        assert relative_difference(weights(undisturbed, STEPS, part), weights(run, STEPS, part)) < 1e-5, part
    expected, found = ([line["train/loss"] for line in history(folder)] for folder in (undisturbed, run))
    assert found == pytest.approx(expected, rel=1e-5)


class Million:
    """A million images of one pixel, which remembers what was read."""

    channels = resolution = 1

    def __init__(self):
        self.read = []

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        self.read.append(index)
        return np.zeros((1, 1, 1), np.uint8)


def test_resuming_at_update_10000_reads_nothing_that_was_seen():
    images, split = Million(), Split(4, 2, 1)
    sampler = WindowSampler(len(images), 0, split)
    loader = make_loader(Batches(images, 0, 1000, "stratified", 1, "center", False), sampler, 0, False)
    sampler.seek(0, 10_000)
    batch = next(iter(loader))
    assert len(images.read) == 4
    assert batch["positions"].tolist() == [80_000, 80_001, 80_002, 80_003]


def test_a_changed_config_takes_effect_and_is_said(pictures, tmp_path, capsys):
    config = lively(pictures, tmp_path / "run", training__num_epochs=1)
    assert run_here(config, tmp_path / "config.yaml") == 0
    capsys.readouterr()
    config["optimizer"]["weight_decay"] = 0.5
    config["training"]["num_epochs"] = 2
    assert run_here(config, tmp_path / "config.yaml") == 0
    printed = capsys.readouterr().out
    assert "optimizer.weight_decay: 0.01 in the checkpoint, 0.5 now" in printed
    assert "training.num_epochs: 1 in the checkpoint, 2 now" in printed
    groups = torch.load(tmp_path / "run/checkpoint-6/optimizer.bin", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.5
    assert load_config(tmp_path / "run/config.yaml").optimizer.weight_decay == 0.5
