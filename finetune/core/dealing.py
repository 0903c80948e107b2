"""How the images of a window are dealt out: which process takes which of them through the network, at which micro-step.

Only places in the window are dealt, 0 .. n-1: what lies at a place, and its gradient's share, does not depend on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune.core.batch import BatchLayout

Places = npt.NDArray[np.int64]


class MicroBatch(NamedTuple):
    """What one process takes through the network at one micro-step."""

    places: Places  # in the window
    real: int  # places[real:] are padding: gone through once more, with weight 0


@dataclass(frozen=True)
class Dealing:
    """A window's images on all processes.

    Attributes:
        micro_batches: of each process, in the order of its micro-steps; all processes have as many.
        gradient_accumulation_steps: what Accelerate has to divide each micro-batch's gradient by.
        num_images: n of the window.
    """

    micro_batches: list[list[MicroBatch]]
    gradient_accumulation_steps: int
    num_images: int

    @property
    def num_processes(self) -> int:
        return len(self.micro_batches)

    @property
    def micro_steps(self) -> int:
        return len(self.micro_batches[0])

    @property
    def weight(self) -> float:
        """Weight of one image's loss: cancels Accelerate's and DDP's divisions, which leaves the mean over n images."""
        return self.gradient_accumulation_steps * self.num_processes / self.num_images

    @property
    def slots(self) -> list[Places]:
        """The places of each process in the order of its micro-steps, -1 for padding."""
        return [np.concatenate([_marked(one) for one in process]) for process in self.micro_batches]

    def in_order(self) -> Iterator[MicroBatch]:
        """As Accelerate deals batches out: micro-batch kP + r is micro-step k of process r."""
        for together in zip(*self.micro_batches, strict=True):
            yield from together


def _marked(micro_batch: MicroBatch) -> Places:
    places = micro_batch.places.copy()
    places[micro_batch.real :] = -1
    return places


@lru_cache(maxsize=4)  # a full window and an epoch's last are all that a run has
def deal_evenly(num_images: int, layout: BatchLayout) -> Dealing:
    """Deal out images of one shape, `micro_batch_size` at a time: micro-batch kP + r is micro-step k of process r.

    A full window takes N micro-steps, a shorter one as few as hold it. What is missing to fill the last ones is
    padding, the window's first image.
    """
    micro, processes = layout.micro_batch_size, layout.num_processes
    places = np.zeros(layout.micro_steps(num_images) * micro * processes, dtype=np.int64)
    places[:num_images] = np.arange(num_images)
    runs = [
        MicroBatch(run, min(max(num_images - number * micro, 0), micro))
        for number, run in enumerate(places.reshape(-1, micro))
    ]
    by_process = [runs[process::processes] for process in range(processes)]
    return Dealing(by_process, layout.gradient_accumulation_steps, num_images)


def deal_by_shape(shapes: Sequence[int] | npt.NDArray[np.int64], layout: BatchLayout) -> Dealing:
    """Deal out images of several shapes, so that a micro-batch has one.

    The places are sorted by shape and cut into equal shares, one a process; a share is cut evenly into micro-batches of
    one shape, at most `micro_batch_size` long. Where a share has fewer of them than another, its longest ones are
    halved, until all processes make the same number K of micro-steps. A window of N x P micro-batches of S shapes takes
    N <= K <= N + S - 1 of them, without padding: a share has at most S - 1 borders between shapes, and each adds
    at most one micro-batch. Only in a shorter window may a share have fewer than K images: what it lacks is padding,
    micro-batches of one image, since attention cannot take empty ones.

    The largest come first, so that running out of memory shows at once; the noise scale is measured with these.

    Args:
        shapes: a number for the shape of the image at each place.
    """
    numbers = np.asarray(shapes, dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    shares = np.array_split(order, layout.num_processes)
    cut = [_micro_batches(share, numbers[share], layout.micro_batch_size) for share in shares]
    steps = max(map(len, cut))
    halved = [sorted(_halved(share, steps), key=len, reverse=True) for share in cut]
    by_process = [[MicroBatch(places, len(places)) for places in share] for share in halved]
    for process in by_process:
        process += [MicroBatch(order[:1], 0)] * (steps - len(process))
    return Dealing(by_process, steps, len(numbers))


def _micro_batches(share: Places, numbers: Places, micro: int) -> list[Places]:
    """A share, sorted by shape, in pieces of one shape, as few as there can be and as even as they come."""
    borders = np.flatnonzero(np.diff(numbers)) + 1
    groups = [group for group in np.split(share, borders) if len(group)]
    return [piece for group in groups for piece in np.array_split(group, -(-len(group) // micro))]


def _halved(pieces: list[Places], count: int) -> list[Places]:
    """As many pieces as asked, by halving the longest again and again; fewer, if they come down to single images."""
    pieces = list(pieces)
    while len(pieces) < count:
        longest = max(range(len(pieces)), key=lambda index: len(pieces[index]), default=-1)
        if longest < 0 or len(pieces[longest]) < 2:
            break
        pieces[longest : longest + 1] = np.array_split(pieces[longest], 2)
    return pieces
