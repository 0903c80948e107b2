"""An epoch's order that is never written out: images are mixed some at a time, and those lie close together on disk.

A source that does not fit in memory is read from its disk once an epoch. Under a full shuffle each read is at a place
of its own; here reads stay within a few hundred short pieces at a time, which the system's cache holds.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Line = tuple[Indices, int, int]

# Another size is another order, which a run would resume in without a word: give it a name of its own in the config.
SPAN = 64  # consecutive images of the source
BLOCK = 16  # spans of one stripe that are mixed with each other
STRIPES = 64


class BlockOrder:
    """The order of any epoch, a function of (seed, epoch) and the number of images n.

    The source is cut into spans, which are shuffled and laid end to end: the epoch's line. It is closed to a ring, and
    from a random place on it is cut into C stripes, of which no two differ by more than one image. Position p is of
    stripe p mod C, so images of one span are C positions apart, or a multiple of it, but for spans across a stripe's
    end. A stripe is taken block by block, and within a block of spans in random order. Each image is equally likely at
    each position.

    The blocks that the stripes are at are at any time those of consecutive positions, `span` x `block` x `stripes` of
    them. They are drawn when they are asked for; beside them only the order of the spans is held.
    """

    def __init__(self, seed: int, num_images: int, span: int = SPAN, block: int = BLOCK, stripes: int = STRIPES):
        self.seed, self.num_images, self.span, self.stripes = seed, num_images, span, stripes
        self.length = span * block  # images of a block
        self.mixed = self.length * stripes  # images that are mixed at a time
        self._line = lru_cache(maxsize=2)(self._shuffled_spans)
        self._blocks = lru_cache(maxsize=2)(self._shuffled_blocks)

    def images(self, epoch: int, positions: Sequence[int] | Indices) -> Indices:
        """The images at some positions of an epoch, int64."""
        places = np.asarray(positions, dtype=np.int64)
        found = np.empty(len(places), dtype=np.int64)
        numbers = places // self.mixed
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._blocks(epoch, number)[places[here] - number * self.mixed]
        return found

    def _shuffled_spans(self, epoch: int) -> Line:
        """The numbers of the spans in the epoch's order, the place in it of the source's last one, which may be
        shorter than others, and the image's place at which the first stripe begins."""
        generator = np.random.default_rng((self.seed, epoch))
        spans = generator.permutation(-(-self.num_images // self.span))
        return spans, int(np.argmax(spans)), int(generator.integers(self.num_images))

    def _shuffled_blocks(self, epoch: int, number: int) -> Indices:
        """The images at positions number x mixed and following, of one block of each stripe: at most `mixed`."""
        generator = np.random.default_rng((self.seed, epoch, number + 1))
        even, longer = divmod(self.num_images, self.stripes)  # the first `longer` stripes have one image more
        stripes, start = np.arange(self.stripes), number * self.length
        starts = stripes * even + np.minimum(stripes, longer) + start
        length = min(even - start, self.length)
        if length == self.length:
            longer = 0  # theirs are of the next blocks
        places = np.tile(np.arange(length + (longer > 0)), (self.stripes, 1))
        places[:longer] = generator.permuted(places[:longer], axis=1)
        places[longer:, :length] = generator.permuted(places[longer:, :length], axis=1)
        # Stripe by stripe at each place: the order of positions. Only the first `longer` stripes have the last place.
        in_order = (starts[:, None] + places).T.reshape(-1)
        return self._on_line(epoch, in_order[: length * self.stripes + longer])

    def _on_line(self, epoch: int, places: Indices) -> Indices:
        """The images at some places of the epoch's line, counted from the first stripe's beginning."""
        spans, last, begin = self._line(epoch)
        places = (places + begin) % self.num_images
        missing = -self.num_images % self.span  # images that the source's last span is short of
        span, inside = np.divmod(places + missing * (places >= (last + 1) * self.span - missing), self.span)
        return spans[span] * self.span + inside
