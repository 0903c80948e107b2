"""Resuming: bit-exact with the same layout, up to rounding with another, and by a seek instead of a replay."""

import numpy as np
import pytest
import torch

from finetune.config.load import load_config
from finetune.core.batch import BatchLayout
from finetune.core.shapes import Shape
from finetune.data.batches import Batches
from finetune.data.order import WindowSampler
from finetune.data.workers import make_loader
from harness.compare import differences, differing, history, moments, unequal
from harness.faults import skip_the_export, stop_after_updates
from harness.processes import finish, run, run_two
from harness.undisturbed import command, undisturbed

STEPS = 6  # 19 images in windows of 8: 8 + 8 + 3, twice


@pytest.fixture(
    scope="module",
    params=[
        ("unconditional", "random"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (("text", "center"), ("lora", "center"), ("sdxl", "random"))
        ),
    ],
    ids="-".join,
)
def base(request, tmp_path_factory):
    """A config with all that a resume could get wrong (crops, flips, warm-up, averaging, a tail), and a run of it."""
    kind, crop = request.param
    return undisturbed(
        tmp_path_factory.mktemp("base"),
        images=19,
        size=(10, 8),
        kind=kind,
        data__crop=crop,
        data__random_flip=True,
        lr_scheduler={"name": "cosine", "warmup_steps": 2},
        logging__tracker="tensorboard",
    )


def stopping(updates):
    skip_the_export()
    stop_after_updates(updates)


# `stops`: updates of each start but the last. Together they stop after every step; 3 is the end of an epoch.
@pytest.mark.parametrize(("stops", "workers"), [((1,), 0), ((3,), 0), ((2, 2, 1), 0), ((4,), 2)])
def test_a_stopped_run_resumes_bit_exactly(base, tmp_path, stops, workers):
    arguments = command(base, tmp_path / "run", f"data.num_workers={workers}")
    for updates in stops:
        stopped = run(*arguments, folder=tmp_path, before=lambda updates=updates: stopping(updates))
        assert stopped.returncode == 143, stopped
    resumed = finish(*arguments, folder=tmp_path, before=skip_the_export)
    step = sum(stops)
    assert f"Resuming from {tmp_path / 'run' / f'checkpoint-{step}'}: step {step} of {STEPS}." in resumed.stdout
    assert differing(base / "run", tmp_path / "run", STEPS) == []
    one, other = (moments(folder / "run", STEPS) for folder in (base, tmp_path))
    assert [name for name in one if unequal(one[name], other[name])] == []


@pytest.mark.slow
def test_a_run_resumes_with_other_processes_and_another_micro_batch(base, tmp_path):
    """1 process x 4 x 2 until step 2, then 2 x 2 x 2 until step 4, then 1 x 1 x 8."""

    def layout(micro, steps):
        return [f"training.micro_batch_size={micro}", f"training.gradient_accumulation_steps={steps}"]

    first = run(*command(base, tmp_path / "run", *layout(4, 2)), folder=tmp_path, before=lambda: stopping(2))
    two = run_two(*command(base, tmp_path / "run", *layout(2, 2)), folder=tmp_path, before=lambda process: stopping(2))
    last = finish(*command(base, tmp_path / "run", *layout(1, 8)), folder=tmp_path, before=skip_the_export)
    assert [outcome.returncode for outcome in (first, *two)] == [143, 143, 143]
    for outcome, step in ((two[0], 2), (last, 4)):
        assert f"Resuming from {tmp_path / 'run' / f'checkpoint-{step}'}: step {step} of {STEPS}." in outcome.stdout
    found = differences(base / "run", tmp_path / "run", STEPS)
    assert {name: apart for name, apart in found.items() if apart > 1e-5} == {}


class Million:
    """A million images of one pixel, which remembers what was read."""

    channels = 1

    def shape(self, index):
        return Shape(1, 1)

    def __init__(self):
        self.read = []

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        self.read.append(index)
        return np.zeros((1, 1, 1), np.uint8)


def test_resuming_at_update_10000_reads_no_image_that_was_seen_before():
    images, seed, layout = Million(), 5, BatchLayout(4, 2, 1)
    sampler = WindowSampler(len(images), seed, layout)
    loader = make_loader(Batches(images, seed, 1000, "stratified", "center", False), sampler, 0, False)
    sampler.seek(0, 10_000)
    next(iter(loader))
    # 10,000 windows of 8 are done: the next image is at position 80,000 of the epoch's permutation.
    assert images.read == np.random.default_rng((seed, 0)).permutation(1_000_000)[80_000:80_004].tolist()


def test_a_changed_setting_takes_effect_and_is_printed(base, tmp_path):
    finish(*command(base, tmp_path / "run", "training.num_epochs=1"), folder=tmp_path, before=skip_the_export)
    changed = command(base, tmp_path / "run", "optimizer.weight_decay=0.5")
    resumed = finish(*changed, folder=tmp_path, before=skip_the_export)
    assert "optimizer.weight_decay: 0.01 in the checkpoint, 0.5 now" in resumed.stdout
    assert "training.num_epochs: 1 in the checkpoint, 2 now" in resumed.stdout
    assert [line["step"] for line in history(tmp_path / "run")] == list(range(1, STEPS + 1))
    groups = torch.load(tmp_path / "run/checkpoint-6/optimizer.bin", weights_only=True)["param_groups"]
    assert groups[0]["weight_decay"] == 0.5
    assert load_config(tmp_path / "run/config.yaml").optimizer.weight_decay == 0.5
