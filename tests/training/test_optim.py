"""The learning rate of every update, by the closed form of each schedule, and changes to a loaded optimizer."""

import math
from typing import get_args

import pytest
import torch

from finetune.config.updates import LRSchedulerConfig, OptimizerConfig
from finetune.core.errors import UserError
from finetune.training.optim import highest_rate, make_lr_scheduler, make_optimizer, set_hyperparameters

TOTAL, WARMUP = 10, 4

# (schedule, its factor at update u): diffusers' definitions, written out
SCHEDULES = [
    ({"name": "constant"}, lambda u: 1.0),
    ({"name": "constant_with_warmup", "warmup_steps": WARMUP}, lambda u: min(u / WARMUP, 1)),
    ({"name": "linear", "warmup_steps": WARMUP}, lambda u: u / 4 if u < 4 else (10 - u) / 6),
    (
        {"name": "cosine", "warmup_steps": WARMUP},
        lambda u: u / 4 if u < 4 else (1 + math.cos(math.pi * (u - 4) / 6)) / 2,
    ),
    (
        {"name": "cosine_with_restarts", "warmup_steps": WARMUP, "num_cycles": 2},
        lambda u: u / 4 if u < 4 else (1 + math.cos(math.pi * (2 * (u - 4) / 6 % 1))) / 2,
    ),
    (
        {"name": "polynomial", "warmup_steps": WARMUP, "power": 2.0},
        # diffusers ends at lr_end = 1e-7, a hundredth of the rate of this test
        lambda u: u / 4 if u < 4 else ((1e-5 - 1e-7) * ((10 - u) / 6) ** 2 + 1e-7) / 1e-5,
    ),
    ({"name": "piecewise_constant", "step_rules": "1:3,0.5:6,0.1"}, lambda u: 1.0 if u < 3 else 0.5 if u < 6 else 0.1),
]


def rates(options, start, stop, rate=1e-5):
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(learning_rate=rate))
    lr_scheduler = make_lr_scheduler(optimizer, LRSchedulerConfig(**options), TOTAL, start)
    found = []
    for _ in range(start, stop):
        found.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    return found


def test_every_schedule_of_the_schema_has_its_closed_form_here():
    names = [name for union in get_args(LRSchedulerConfig.model_fields["name"].annotation) for name in get_args(union)]
    assert sorted(names) == sorted(options["name"] for options, _ in SCHEDULES)


@pytest.mark.parametrize(("options", "factor"), SCHEDULES, ids=[options["name"] for options, _ in SCHEDULES])
def test_learning_rate_at_every_update(options, factor):
    assert rates(options, 0, TOTAL) == pytest.approx([1e-5 * factor(update) for update in range(TOTAL)], rel=1e-12)


@pytest.mark.parametrize(("options", "factor"), SCHEDULES, ids=[options["name"] for options, _ in SCHEDULES])
@pytest.mark.parametrize("updates", [1, 4, 9])
def test_a_resumed_schedule_continues_bit_exactly(options, factor, updates):
    assert rates(options, updates, TOTAL) == rates(options, 0, TOTAL)[updates:]


def test_a_loaded_optimizer_takes_the_hyperparameters_of_the_present_config():
    parameter = torch.nn.Parameter(torch.ones(1))
    old = make_optimizer([parameter], OptimizerConfig(learning_rate=1e-3, weight_decay=0.5))
    parameter.grad = torch.ones(1)
    old.step()
    new = make_optimizer([parameter], OptimizerConfig())
    new.load_state_dict(old.state_dict())
    config = OptimizerConfig(learning_rate=2e-4, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    set_hyperparameters(new, config)
    make_lr_scheduler(new, LRSchedulerConfig(name="linear"), TOTAL, updates=5)
    group = new.param_groups[0]
    assert group["lr"] == pytest.approx(1e-4)  # half of the way down from 2e-4
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-6)
    assert new.state[parameter]["step"] == 1  # what the optimizer had learned stays


def test_a_polynomial_schedule_that_is_all_warm_up_is_refused():
    with pytest.raises(UserError, match="found 10; expected fewer than this run's 10 updates"):
        rates({"name": "polynomial", "warmup_steps": TOTAL}, 0, 1)


@pytest.mark.parametrize(
    ("schedule", "updates", "factor"),
    [
        ({"name": "constant"}, 3, 1.0),
        ({"name": "linear"}, 3, 1.0),
        ({"name": "cosine_with_restarts", "num_cycles": 9}, 3, 1.0),
        ({"name": "constant_with_warmup", "warmup_steps": 100}, 3, 2 / 100),  # updates 0, 1 and 2
        ({"name": "cosine", "warmup_steps": 100}, 101, 1.0),
        ({"name": "cosine", "warmup_steps": 100}, 100, 99 / 100),
        ({"name": "linear", "warmup_steps": 777}, 1_000_000, 1.0),  # of which not every update is looked at
        ({"name": "constant_with_warmup", "warmup_steps": 2_000_001}, 1_000_001, 1_000_000 / 2_000_001),
        ({"name": "piecewise_constant", "step_rules": "0.5:2,0.25"}, 2, 0.5),
    ],
)
def test_the_highest_learning_rate_of_a_run(schedule, updates, factor):
    config = OptimizerConfig(learning_rate=1e-3)
    assert highest_rate(config, LRSchedulerConfig(**schedule), updates) == pytest.approx(1e-3 * factor, rel=1e-9)
