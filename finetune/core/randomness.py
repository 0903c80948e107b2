"""Noise, timesteps and augmentation, each a pure function of (seed, purpose, epoch, position).

Nothing here reads or moves a global generator, so nothing depends on the process, the worker or the micro-batch that an
image happens to meet, a checkpoint needs no generator states, and any window can be done again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Positions = Sequence[int] | npt.NDArray[np.int64]  # of images in their epoch's order
GOLDEN_RATIO_FRACTION = 0.6180339887  # its multiples mod 1 fill the unit interval most evenly, at any length


def key(seed: int, purpose: str, epoch: int, position: int) -> int:
    """A 64-bit hash of the key (torch's CPU generator uses the lower 32 bits of a seed, numpy's all)."""
    text = f"{seed}/{purpose}/{epoch}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def noise(seed: int, epoch: int, position: int, shape: tuple[int, ...], purpose: str = "noise") -> torch.Tensor:
    """Standard normal noise of the given shape, on the CPU: the same for every device that will train on it."""
    generator = torch.Generator().manual_seed(key(seed, purpose, epoch, position))
    return torch.randn(shape, generator=generator)


def conditions_dropped(seed: int, epoch: int, positions: Positions, probability: float) -> npt.NDArray[np.bool_]:
    """Which images are trained without their condition, bool (n,): a stream of its own, so that no other changes."""
    if not probability:
        return np.zeros(len(positions), dtype=np.bool_)
    return draws(seed, "condition dropout", epoch, positions) < probability


def timesteps(
    seed: int, epoch: int, positions: Positions, num_train_timesteps: int, sampling: str
) -> npt.NDArray[np.int64]:
    """The timesteps of n images, int64 (n,), each uniform over 0 .. T-1.

    `uniform` draws each independently. `stratified` walks the range in golden-ratio steps from an offset u(seed,
    epoch): t = floor(T * frac(u + position * 0.6180339887)). Each timestep is as likely as any other, and any run of
    consecutive positions covers the range evenly.
    """
    if sampling == "stratified":
        offset = uniform(seed, "timesteps", epoch, 0, 1)[0]
        fractions = (offset + np.asarray(positions, dtype=np.int64) * GOLDEN_RATIO_FRACTION) % 1.0
    else:
        fractions = draws(seed, "timestep", epoch, positions)
    return (num_train_timesteps * fractions).astype(np.int64)


def draws(seed: int, purpose: str, epoch: int, positions: Positions) -> npt.NDArray[np.float64]:
    """What `uniform` draws first for each of n positions, float64 (n,)."""
    start, places = f"{seed}/{purpose}/{epoch}/", np.asarray(positions, dtype=np.int64).tolist()
    digests = [hashlib.blake2b(f"{start}{place}".encode(), digest_size=8).digest() for place in places]
    return _unit_interval(b"".join(digests))


def uniform(seed: int, purpose: str, epoch: int, position: int, count: int) -> tuple[float, ...]:
    """`count` draws from [0, 1): 53 bits each of a hash of the key, at about a microsecond a draw."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{position}".encode(), digest_size=8 * count).digest()
    return tuple(_unit_interval(digest))


def _unit_interval(digests: bytes) -> npt.NDArray[np.float64]:
    """A number from [0, 1) for each 8 bytes."""
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
