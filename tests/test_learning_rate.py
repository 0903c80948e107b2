"""The learning rate that is logged at every update is what the config says, whatever the split and after a resume."""

from typing import get_args

import pytest
import torch
from diffusers.optimization import get_scheduler

from finetune.config import LRSchedulerConfig
from tiny import (
    history,
    launch,
    leave_out_the_export,
    let_run,
    run_here,
    stop_after_updates,
    tiny_config,
    write_config,
    write_pictures,
)

IMAGES, BATCH, EPOCHS, RATE = 19, 8, 2, 1e-3
STEPS = 6  # an epoch has windows of 8, 8 and 3 images
SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"warmup_steps": 3},
    "piecewise_constant": {"step_rules": "1:2,0.5:4,0.1"},
    "linear": {"warmup_steps": 3},
    "cosine": {"warmup_steps": 3},
    "cosine_with_restarts": {"warmup_steps": 2, "num_cycles": 2},
    "polynomial": {"warmup_steps": 3, "power": 2.0},
}
SPLITS = [(processes, steps) for processes in (1, 2) for steps in (1, 2, 4)]


def expected(name):
    """diffusers' own schedule on an optimizer that does nothing, stepped once an update."""
    names = {"warmup_steps": "num_warmup_steps"}
    options = {names.get(option, option): value for option, value in SCHEDULES[name].items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    lr_scheduler = get_scheduler(name, optimizer, num_training_steps=STEPS, **options)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    return rates


def config_of(base, name, processes, steps):
    return tiny_config(
        base / "pictures",
        base / f"{name}-{processes}-{steps}",
        training={"global_batch_size": BATCH, "gradient_accumulation_steps": steps, "num_epochs": EPOCHS},
        optimizer__learning_rate=RATE,
        lr_scheduler={"name": name, **SCHEDULES[name]},
        ema__enabled=False,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Where all two-process runs have been, in one launch."""
    base = tmp_path_factory.mktemp("base")
    write_pictures(base / "pictures", IMAGES)
    files = [
        write_config(base / f"{name}-{steps}.yaml", config_of(base, name, processes, steps))
        for name in SCHEDULES
        for processes, steps in SPLITS
        if processes == 2
    ]
    outcome = launch(*files, processes=2, script="tests/several.py")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return base


@pytest.fixture
def no_export(monkeypatch):
    from finetune import model, pictures

    for owner, name in ((model, "save_pipeline"), (pictures, "loss_curve")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    leave_out_the_export()
    yield
    let_run()


def logged(base, name, processes, steps):
    lines = history(base / f"{name}-{processes}-{steps}")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["train/learning_rate"] for line in lines]


def test_every_schedule_of_the_config_is_here():
    names = [name for union in get_args(LRSchedulerConfig.model_fields["name"].annotation) for name in get_args(union)]
    assert set(names) == set(SCHEDULES)
    for name in SCHEDULES:
        assert (len(set(expected(name))) > 2) == (name != "constant")


@pytest.mark.parametrize(("processes", "steps"), SPLITS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_at_every_update_in_every_split(base, no_export, name, processes, steps):
    if processes == 1:
        assert run_here(config_of(base, name, 1, steps), base / "config.yaml") == 0
    assert logged(base, name, processes, steps) == pytest.approx(expected(name), rel=1e-12)


@pytest.mark.parametrize("stop", [2, 3, 4])  # in the warm-up, at its and an epoch's end, in the last epoch
@pytest.mark.parametrize("name", SCHEDULES)
def test_after_resuming(base, tmp_path, no_export, name, stop):
    (tmp_path / "pictures").symlink_to(base / "pictures")
    stop_after_updates(stop)
    assert run_here(config_of(tmp_path, name, 1, 2), tmp_path / "config.yaml") == 143
    let_run()
    assert run_here(config_of(tmp_path, name, 1, 4), tmp_path / "config.yaml", f"output_dir={tmp_path}/{name}-1-2") == 0
    assert logged(tmp_path, name, 1, 2) == pytest.approx(expected(name), rel=1e-12)
