"""Noise, timesteps and augmentation, each a pure function of (seed, purpose, epoch, position).

Nothing here reads or moves a global generator, so nothing depends on the process, the worker or the micro-batch that an
image happens to meet, a checkpoint needs no generator states, and any window can be done again.
"""

import hashlib

import numpy as np
import torch

GOLDEN_RATIO_FRACTION = 0.6180339887  # its multiples mod 1 fill the unit interval most evenly, at any length


def key(seed: int, purpose: str, epoch: int, position: int) -> int:
    """A 64-bit hash of the key (torch's CPU generator uses the lower 32 bits of a seed, numpy's all)."""
    text = f"{seed}/{purpose}/{epoch}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def noise(seed: int, epoch: int, position: int, shape: tuple[int, ...], purpose: str = "noise") -> torch.Tensor:
    """Standard normal noise of the given shape, on the CPU: the same for every device that will train on it."""
    generator = torch.Generator().manual_seed(key(seed, purpose, epoch, position))
    return torch.randn(shape, generator=generator)


def condition_dropped(seed: int, epoch: int, position: int, probability: float) -> bool:
    """Whether an image is trained without its condition: a stream of its own, so that others do not change with it."""
    return probability > 0 and uniform(seed, "condition dropout", epoch, position, 1)[0] < probability


def timestep(seed: int, epoch: int, position: int, num_train_timesteps: int, sampling: str) -> int:
    """The timestep of one image, uniform over 0 .. T-1.

    `uniform` draws each independently. `stratified` walks the range in golden-ratio steps from an offset u(seed,
    epoch): t = floor(T * frac(u + position * 0.6180339887)). Each timestep is as likely as any other, and any run of
    consecutive positions covers the range evenly.
    """
    if sampling == "stratified":
        fraction = (uniform(seed, "timesteps", epoch, 0, 1)[0] + position * GOLDEN_RATIO_FRACTION) % 1.0
    else:
        fraction = uniform(seed, "timestep", epoch, position, 1)[0]
    return int(num_train_timesteps * fraction)


def uniform(seed: int, purpose: str, epoch: int, position: int, count: int) -> tuple[float, ...]:
    """`count` draws from [0, 1): 53 bits each of a hash of the key, at about a microsecond a draw."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{position}".encode(), digest_size=8 * count).digest()
    return tuple((np.frombuffer(digest, dtype="<u8") >> np.uint64(11)) * 2.0**-53)
