"""The optimizer and the learning rate, both counted in updates that were applied."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from finetune.config import LRSchedulerConfig, OptimizerConfig
from finetune.errors import UserError


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW. The fused kernel does the same arithmetic in one pass over the weights."""
    # The rate goes in here too: diffusers' polynomial schedule reads it from the optimizer's defaults.
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    set_hyperparameters(optimizer, config)
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> None:
    """Put an optimizer on this config's terms; one that was just loaded carries those of the run that saved it."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
        group.update(betas=tuple(config.betas), weight_decay=config.weight_decay, eps=config.eps)


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: LRSchedulerConfig, total_updates: int, updates: int = 0
) -> LambdaLR:
    """Any of diffusers' schedules over `total_updates`, with `updates` of them done.

    Each is a factor in closed form of the number of the update, so that number is all its state. To be stepped once per
    update, and not to be prepared by Accelerate, which would step it once per process.

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
