"""The optimizer and the learning rate, both counted in updates that were applied."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from finetune.config.updates import LRSchedulerConfig, OptimizerConfig
from finetune.core.errors import UserError


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW. The fused kernel does the same arithmetic in one pass over the weights."""
    # The rate goes in here too: diffusers' polynomial schedule reads it from the optimizer's defaults.
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    set_hyperparameters(optimizer, config)
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Overwrite the optimizer's hyperparameters from the config; loading a checkpoint brought back the saved ones."""
    for group in optimizer.param_groups:
        group.update(optimizer.defaults)
        group["lr"] = group["initial_lr"] = config.learning_rate
        group.update(betas=tuple(config.betas), weight_decay=config.weight_decay, eps=config.eps)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: LRSchedulerConfig, total_updates: int, updates: int = 0
) -> LambdaLR:
    """Any of diffusers' schedules over `total_updates`, `updates` of which are done.

    Each is a closed-form factor of the update's number, so that number is its whole state. Step it once per update, and
    do not let Accelerate prepare it, which would step it once per process.

    Raises:
        UserError: if a polynomial schedule has no update after its warm-up, which diffusers divides by.
    """
    if config.name == "polynomial" and config.warmup_steps >= total_updates:
        raise UserError(
            f"lr_scheduler.warmup_steps: found {config.warmup_steps}; expected fewer than this run's {total_updates} "
            "updates with polynomial"
        )
    return get_scheduler(
        config.name,
        optimizer,
        step_rules=config.step_rules,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=total_updates,
        num_cycles=config.num_cycles,
        power=config.power,
        last_epoch=updates - 1,
    )


def highest_rate(config: OptimizerConfig, schedule: LRSchedulerConfig, total_updates: int) -> float:
    """The largest learning rate of a run's updates, at a thousand of them: a long warm-up may never reach the peak.

    Raises:
        UserError: as `make_lr_scheduler` does.
    """
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    (factor,) = make_lr_scheduler(optimizer, schedule, total_updates).lr_lambdas
    last = total_updates - 1
    updates = {min(schedule.warmup_steps, last), last, *range(0, total_updates, -(-total_updates // 1000))}
    return config.learning_rate * max(factor(update) for update in updates)
