"""The moving average of the trainable parameters, by diffusers' EMAModel."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from finetune.config.updates import EMAConfig
from finetune.core.sharding import local


class LocalEMA(EMAModel):  # type: ignore[misc] # diffusers has no types
    """The average of what this process holds of trained parameters: all of them, or its parts of sharded ones.

    torch's foreach kernels copy no sharded tensors, and there is nothing here that processes would have to agree on.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **options: Any):
        super().__init__(_local(parameters), **options)

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """As EMAModel's, in one pass: that one first computes all differences, which takes a copy of the weights."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, [*_local(parameters)], 1 - self.cur_decay_value)

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().store(_local(parameters))

    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().copy_to(_local(parameters))

    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().restore(_local(parameters))


def _local(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """What this process holds of parameters, in the same memory."""
    held = [(weight, local(weight)) for weight in parameters]
    return [own if own is weight else torch.nn.Parameter(own, weight.requires_grad) for weight, own in held]


def make_ema(parameters: Iterable[torch.nn.Parameter], config: EMAConfig) -> EMAModel | None:
    """The average, on the parameters' device, warmed up as 1 - (1 + step)^-power up to `decay`; None if disabled."""
    if not config.enabled:
        return None
    return LocalEMA(parameters, decay=config.decay, use_ema_warmup=True, power=config.power, foreach=True)


@contextmanager
def averaged_weights(parameters: Iterable[torch.nn.Parameter], ema: EMAModel | None) -> Iterator[None]:
    """Put the averaged weights into the parameters for the block; costs one copy of the weights in host memory."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
