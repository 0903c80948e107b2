"""Captions: the texts that go with each image, and which of them an image is trained with.

An image may have several. The choice is drawn anew at each of its positions, as a stream of its own, so that adding
or removing a caption changes neither noise nor timesteps.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetune.core import randomness
from finetune.data.order import Indices, Slot


class Captions(NamedTuple):
    """The captions of n images."""

    texts: list[str]  # the distinct ones, sorted
    rows: Indices  # int64: the place in `texts` of every caption, image by image
    starts: Indices  # int64 (n + 1,): image i has rows[starts[i] : starts[i + 1]]

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> "Captions":
        """From the texts of each image, one or more."""
        texts = sorted({text for several in captions for text in several})
        places = {text: place for place, text in enumerate(texts)}
        rows = np.array([places[text] for several in captions for text in several], dtype=np.int64)
        return cls(texts, rows, np.cumsum([0, *map(len, captions)], dtype=np.int64))

    def select(self, images: Indices) -> "Captions":
        """Those of some of the images, in the order given."""
        return Captions.of([self.all_of(int(image)) for image in images])

    def all_of(self, image: int) -> list[str]:
        """The texts of an image, in the order in which the source has them."""
        return [self.texts[row] for row in self.rows[self.starts[image] : self.starts[image + 1]]]

    def first(self, image: int) -> int:
        """The place in `texts` of an image's first caption, which validation shows."""
        return int(self.rows[self.starts[image]])

    def examples(self, most: int) -> list[str]:
        """The captions of the first images, each once."""
        found: dict[str, None] = {}
        for image in range(len(self.starts) - 1):
            if len(found) == most:
                break
            found[self.texts[self.first(image)]] = None
        return [*found]

    def drawn(self, seed: int, slot: Slot) -> int:
        """The place in `texts` of the caption that a slot is trained with."""
        start, stop = self.starts[slot.image : slot.image + 2]
        if stop - start == 1:
            return int(self.rows[start])
        draw = randomness.uniform(seed, "caption", slot.epoch, slot.position, 1)[0]
        return int(self.rows[start + int(draw * (stop - start))])

    @property
    def digest(self) -> bytes:
        """A hash of all captions and of the images that they belong to."""
        digest = hashlib.blake2b(self.rows.astype("<i8").tobytes() + self.starts.astype("<i8").tobytes())
        for text in self.texts:
            digest.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest())
        return digest.digest()
