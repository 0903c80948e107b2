"""A pass through the network that is evaluated, from what a batch holds to what is shown of the output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from finetune.core.kind import Batch, Kind, predict
from finetune.data.pixels import Pixels


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """The network in evaluation mode for the block."""
    network.eval()
    try:
        yield
    finally:
        network.train()


class Prediction(NamedTuple):
    """A forward pass: what went in and what came out, each (b, C, H, W) but the timesteps (b,)."""

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    noisy: torch.Tensor
    output: torch.Tensor


def predict_noised(kind: Kind, batch: Batch, device: torch.device) -> Prediction:
    """Noise what a batch holds, on a device, and have the network predict from it."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    drawn, timesteps = batch["noise"], batch["timesteps"]
    clean, conditions = kind.inputs(batch)
    noisy = kind.noise_scheduler.add_noise(clean, drawn, timesteps)
    return Prediction(clean, drawn, timesteps, noisy, predict(kind.network, noisy, timesteps, conditions))


def as_pixels(images: torch.Tensor) -> Pixels:
    """From (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
