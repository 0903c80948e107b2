"""The moving average of the trainable parameters, by diffusers' EMAModel."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from finetune.config.updates import EMAConfig


def make_ema(parameters: Iterable[torch.nn.Parameter], config: EMAConfig) -> EMAModel | None:
    """The average, on the parameters' device, warmed up as 1 - (1 + step)^-power up to `decay`; None if disabled."""
    if not config.enabled:
        return None
    return EMAModel(parameters, decay=config.decay, use_ema_warmup=True, power=config.power, foreach=True)


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
