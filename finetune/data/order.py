"""Which image goes where: epoch order, accumulation windows, and the weight of every slot.

A run is a sequence of windows, each the images of one update. How a window is divided over processes and micro-batches
is a matter of hardware; what is in it is not. Everything here is a pure function of (seed, epoch, window).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.core.batch import BatchLayout, window_range, windows_per_epoch

Indices = npt.NDArray[np.int64]


class Slot(NamedTuple):
    """One place in a window."""

    image: int  # index into the training images
    epoch: int
    position: int  # the image's place in its epoch's order, 0 .. n-1
    weight: float  # N * P / n_w for a real image, 0 for padding


def epoch_order(seed: int, epoch: int, num_images: int) -> Indices:
    """The epoch's permutation of the image indices, int64, shape (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def held_out(seed: int, num_images: int, fraction: float) -> Indices:
    """Sorted indices of the images that are held out for validation, chosen by the seed alone.

    Any positive fraction of two or more images holds out at least one and never all of them.
    """
    if fraction == 0 or num_images < 2:
        return np.empty(0, dtype=np.int64)
    count = min(max(round(fraction * num_images), 1), num_images - 1)
    order = np.random.default_rng((seed, num_images)).permutation(num_images)
    return np.sort(order[:count])


def deal(images: Indices, epoch: int, positions: range, layout: BatchLayout) -> Iterator[list[Slot]]:
    """Micro-batches of one window: micro-batch kP + r is micro-step k of process r.

    Args:
        images: the epoch's order, shape (n,).
        positions: the window's positions in that order.

    Every micro-batch has `micro_batch_size` slots, and their number is a multiple of the processes, so that every
    process does the same number of micro-steps, each of one shape. Missing slots are padding: the window's first image
    with weight 0. The weight N * P / n_w undoes Accelerate's division by N and DDP's by P: the mean over n_w images.
    """
    weight = layout.gradient_accumulation_steps * layout.num_processes / len(positions)
    slots = [Slot(int(images[position]), epoch, position, weight) for position in positions]
    micro, stride = layout.micro_batch_size, layout.micro_batch_size * layout.num_processes
    slots += [slots[0]._replace(weight=0.0)] * (-len(slots) % stride)
    for start in range(0, len(slots), micro):
        yield slots[start : start + micro]


class WindowSampler:
    """A batch sampler that yields the rest of one epoch, all processes' micro-batches in global order.

    `accelerator.prepare` deals them out. It leaves them untouched because every batch has `batch_size` slots and the
    length is a multiple of the number of processes. Resuming is a seek: completed windows are never generated.
    """

    drop_last = True

    def __init__(self, num_images: int, seed: int, layout: BatchLayout):
        self.num_images, self.seed, self.layout = num_images, seed, layout
        self.epoch = self.window = 0

    @property
    def batch_size(self) -> int:
        return self.layout.micro_batch_size

    def seek(self, epoch: int, window: int) -> None:
        """Have the next iteration yield this epoch, from this window on."""
        self.epoch, self.window = epoch, window

    def _remaining(self) -> Iterator[range]:
        count = windows_per_epoch(self.num_images, self.layout.global_batch_size)
        for window in range(self.window, count):
            yield window_range(window, self.num_images, self.layout.global_batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        order = epoch_order(self.seed, self.epoch, self.num_images)
        for positions in self._remaining():
            yield from deal(order, self.epoch, positions, self.layout)

    def __len__(self) -> int:
        stride = self.layout.micro_batch_size * self.layout.num_processes
        return sum(-(-len(positions) // stride) for positions in self._remaining()) * self.layout.num_processes
