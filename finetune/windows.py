"""Which image goes where: epoch order, accumulation windows, and the weight of every slot.

The run is a sequence of windows, each the images of one update. How a window is split over processes and
micro-batches is a matter of hardware; what is in it is not. All here is a pure function of (seed, epoch, window).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """One place in a window."""

    image: int  # index into the training images
    epoch: int
    position: int  # the image's place in its epoch's order, 0 .. n-1
    weight: float  # N * P / n_w for a real image, 0 for padding


@dataclass(frozen=True)
class Split:
    """How a window is shared out: micro-batch x accumulation steps x processes = the global batch."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_processes


def windows_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Updates in one epoch: the last window may be shorter, but it is one."""
    return -(-num_images // global_batch_size)


def window_range(window: int, num_images: int, global_batch_size: int) -> range:
    """Positions of a window within its epoch: wB .. min((w+1)B, n) - 1."""
    return range(window * global_batch_size, min((window + 1) * global_batch_size, num_images))


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The epoch's permutation of the image indices, int64, shape (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def held_out(seed: int, num_images: int, fraction: float) -> np.ndarray:
    """Sorted indices of the images that are kept for validation, chosen by the seed alone.

    Any positive fraction of two or more images holds out at least one and never all of them.
    """
    if fraction == 0 or num_images < 2:
        return np.empty(0, dtype=np.int64)
    count = min(max(round(fraction * num_images), 1), num_images - 1)
    order = np.random.default_rng((seed, num_images)).permutation(num_images)
    return np.sort(order[:count])


def deal(images: np.ndarray, epoch: int, positions: range, split: Split) -> Iterator[list[Slot]]:
    """Micro-batches of one window, in the order of micro-step x process: run kP + r is micro-step k of process r.

    Args:
        images: the epoch's order, shape (n,).
        positions: the window's positions in that order.

    Every run has `micro_batch_size` slots and their number is a multiple of the processes, so that every process does
    the same number of micro-steps, each of one shape. What is missing is padding: the window's first image, weight 0.
    The weight N * P / n_w undoes Accelerate's division by N and DDP's by P, which leaves the mean over n_w images.
    """
    weight = split.gradient_accumulation_steps * split.num_processes / len(positions)
    slots = [Slot(int(images[position]), epoch, position, weight) for position in positions]
    micro, stride = split.micro_batch_size, split.micro_batch_size * split.num_processes
    slots += [slots[0]._replace(weight=0.0)] * (-len(slots) % stride)
    for start in range(0, len(slots), micro):
        yield slots[start : start + micro]


class WindowSampler:
    """A batch sampler that yields the rest of one epoch, all processes' micro-batches in global order.

    `accelerator.prepare` deals them out. It leaves them untouched because every batch has `batch_size` slots and the
    length is a multiple of the number of processes. Resuming is a seek: windows that were done are never generated.
    """

    drop_last = True

    def __init__(self, num_images: int, seed: int, split: Split):
        self.num_images, self.seed, self.split = num_images, seed, split
        self.epoch = self.window = 0

    @property
    def batch_size(self) -> int:
        return self.split.micro_batch_size

    def seek(self, epoch: int, window: int) -> None:
        """The next iteration yields this epoch, from this window on."""
        self.epoch, self.window = epoch, window

    def _remaining(self) -> Iterator[range]:
        count = windows_per_epoch(self.num_images, self.split.global_batch_size)
        for window in range(self.window, count):
            yield window_range(window, self.num_images, self.split.global_batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        order = epoch_order(self.seed, self.epoch, self.num_images)
        for positions in self._remaining():
            yield from deal(order, self.epoch, positions, self.split)

    def __len__(self) -> int:
        stride = self.split.micro_batch_size * self.split.num_processes
        return sum(-(-len(positions) // stride) for positions in self._remaining()) * self.split.num_processes
