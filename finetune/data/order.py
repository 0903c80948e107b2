"""Which image goes where: epoch order, accumulation windows, and the weight of every slot.

A run is a sequence of windows, each the images of one update. How a window is divided over processes and micro-batches
is a matter of hardware; what is in it is not. Everything here is a pure function of (seed, epoch, window).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from finetune.core.batch import BatchLayout, window_range, windows_per_epoch
from finetune.core.dealing import Dealing, deal_by_shape, deal_evenly
from finetune.data.blocks import BlockOrder

Indices = npt.NDArray[np.int64]


class Slot(NamedTuple):
    """One place in a window."""

    image: int  # index into the training images
    epoch: int
    position: int  # the image's place in its epoch's order, 0 .. n-1
    weight: float  # of its loss (see `Dealing.weight`), 0 for padding


class Order(Protocol):
    """Which image is at a position of an epoch. Every epoch has each image once."""

    def images(self, epoch: int, positions: Sequence[int] | Indices) -> Indices:
        """The images at some positions of an epoch, int64."""
        ...


class FullOrder:
    """Each epoch is a permutation of all images, drawn from (seed, epoch): 8 bytes an image, in each process."""

    def __init__(self, seed: int, num_images: int):
        self._permutation = lru_cache(maxsize=2)(lambda epoch: epoch_order(seed, epoch, num_images))

    def images(self, epoch: int, positions: Sequence[int] | Indices) -> Indices:
        """The images at some positions of an epoch, int64."""
        return self._permutation(epoch)[np.asarray(positions, dtype=np.int64)]


def make_order(name: str, seed: int, num_images: int) -> Order:
    """The order that `data.order` names. No more images than `blocks` mixes at a time are all mixed, as `full` does."""
    blocks = BlockOrder(seed, num_images)
    return blocks if name == "blocks" and num_images > blocks.mixed else FullOrder(seed, num_images)


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


def deal(images: Indices, epoch: int, positions: range, dealing: Dealing) -> Iterator[list[Slot]]:
    """Micro-batches of one window, in the order in which Accelerate deals them out.

    Args:
        images: of the window, shape (n_w,).
        positions: theirs, in the epoch's order.
    """
    numbers, first, weight = images.tolist(), positions.start, dealing.weight
    for places, real in dealing.in_order():
        yield [
            Slot(numbers[place], epoch, first + place, weight if number < real else 0.0)
            for number, place in enumerate(places.tolist())
        ]


class WindowSampler:
    """A batch sampler that yields the rest of one epoch, all processes' micro-batches in global order.

    `accelerator.prepare` deals them out. It leaves them untouched because the length is a multiple of the number of
    processes and every batch has `batch_size` slots, or because `batch_size` is None. Resuming is a seek: completed
    windows are never generated.
    """

    drop_last = True

    def __init__(
        self, num_images: int, seed: int, layout: BatchLayout, shapes: Indices | None = None, order: str = "full"
    ):
        """Sample windows of `num_images` images.

        Args:
            shapes: a number for the shape of each image; None if all have one.
            order: as `data.order` names it.
        """
        self.num_images, self.layout, self.shapes = num_images, layout, shapes
        self.order = make_order(order, seed, num_images)
        self.epoch = self.window = 0

    @property
    def batch_size(self) -> int | None:
        """Slots in each batch; None tells Accelerate that they are as many as they are."""
        return self.layout.micro_batch_size if self.shapes is None else None

    def seek(self, epoch: int, window: int) -> None:
        """Have the next iteration yield this epoch, from this window on."""
        self.epoch, self.window = epoch, window

    def dealing(self, epoch: int, window: int) -> Dealing:
        """How a window is dealt out."""
        positions = self._positions(window)
        if self.shapes is None:
            return deal_evenly(len(positions), self.layout)
        return deal_by_shape(self.shapes[self.order.images(epoch, positions)], self.layout)

    def _positions(self, window: int) -> range:
        return window_range(window, self.num_images, self.layout.global_batch_size)

    def _remaining(self) -> range:
        return range(self.window, windows_per_epoch(self.num_images, self.layout.global_batch_size))

    def __iter__(self) -> Iterator[list[Slot]]:
        epoch = self.epoch
        for window in self._remaining():
            positions = self._positions(window)
            yield from deal(self.order.images(epoch, positions), epoch, positions, self.dealing(epoch, window))

    def __len__(self) -> int:
        if self.shapes is None:
            remaining = self._remaining()  # all but the last take N micro-steps
            full = max(len(remaining) - 1, 0) * self.layout.gradient_accumulation_steps
            last = len(self._positions(remaining[-1])) if remaining else 0
            steps = full + self.layout.micro_steps(last)
        else:
            steps = sum(self.dealing(self.epoch, window).micro_steps for window in self._remaining())
        return steps * self.layout.num_processes
