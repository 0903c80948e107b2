"""Decoded images: the rows of the cache, and how pixels are read from them.

Pixels are raw bytes in memory-mapped arrow files and are copied only into a batch. A run holds no more images in its
own memory than it is working on, and its workers share one page cache.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt

from finetune.core.shapes import Shape
from finetune.data.captions import Captions
from finetune.data.order import Indices

FORMAT = 6  # of cached rows: bump it when decoding changes
FEATURES = datasets.Features(
    pixels=datasets.Value("large_binary"),  # channels x height x width bytes; none of a bad picture
    height=datasets.Value("int32"),
    width=datasets.Value("int32"),
    checksum=datasets.Value("int64"),  # of shape and pixels
    error=datasets.Value("string"),  # why a picture is bad
    original_width=datasets.Value("int32"),
    original_height=datasets.Value("int32"),
    original_colour=datasets.Value("bool"),
    original_several=datasets.Value("bool"),
)
# Where pictures have many shapes, also what is trained of each; `original_*` is then upright.
SHAPED_FEATURES = datasets.Features(
    **FEATURES, shape_height=datasets.Value("int32"), shape_width=datasets.Value("int32")
)


Encoded = dict[str, Any]  # a picture as `datasets` holds it: bytes, path
Row = dict[str, Any]  # of the cache
Pixels = npt.NDArray[np.uint8]


class BadImageError(Exception):
    """A picture that cannot be used; the message says why, and follows the picture's name."""


class Images(Sequence[Pixels]):
    """Decoded images: a view of rows in memory-mapped files, at 16 bytes of memory an image.

    Can be forked and pickled (to spawned workers): paths are sent, not pixels.

    Attributes:
        labels: int64 (n,), -1 for none; None where the source has no labels.
        label_names: the name of label k, where labels have names.
        captions: their texts; None unless they were asked for.
        notes: lines for the plan: what was found in the source, and what was left out.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        rows: Indices,
        channels: int,
        resolution: int,
        labels: Indices | None = None,
        label_names: list[str] | None = None,
        notes: Sequence[str] = (),
        captions: Captions | None = None,
    ):
        self.table, self.rows, self.channels, self.resolution = table, rows, channels, resolution
        self.labels, self.label_names = labels, label_names
        self.notes, self.captions = list(notes), captions
        self._shapes = None
        if "shape_height" in table.column_names:
            sides = [table.data.column(f"shape_{side}").to_numpy() for side in Shape._fields]
            self._shapes = np.stack(sides, axis=1)
        self._open()

    def _open(self) -> None:
        """Views of the record batches' buffers; `datasets` would copy them into Python objects row by row."""
        self._starts, self._batches, start = [], [], 0
        for batch in self.table.data.to_batches():
            pixels = batch.column("pixels")
            _, offsets, data = pixels.buffers()
            offsets = np.frombuffer(offsets, dtype=np.int64)[pixels.offset :]
            heights, widths = (batch.column(name).to_numpy() for name in ("height", "width"))
            self._starts.append(start)
            self._batches.append((data, offsets, heights, widths))
            start += len(batch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_starts", "_batches")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, index: int) -> Pixels:
        """One image, uint8 (H, W, C), read-only and not copied; H or W exceed its shape if crops are random."""
        row = self.rows[index]
        number = bisect_right(self._starts, row) - 1
        data, offsets, heights, widths = self._batches[number]
        row -= self._starts[number]
        shape = (self.channels, heights[row], widths[row])
        return np.ndarray(shape, dtype=np.uint8, buffer=data, offset=offsets[row]).transpose(1, 2, 0)

    def __getitem__(self, index: int) -> Pixels:  # type: ignore[override] # no slices: see `select`
        """The centre of one image, uint8 (H, W, C) of its shape, without augmentation."""
        pixels, (height, width) = self.pixels(index), self.shape(index)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + height, left : left + width]

    def shape(self, index: int) -> Shape:
        """What is trained of one image: the square of the resolution, or a shape near its own."""
        if self._shapes is None:
            return Shape(self.resolution, self.resolution)
        return Shape(*self._shapes[self.rows[index]].tolist())

    @property
    def shapes(self) -> dict[Shape, int]:
        """The number of images of each shape that occurs, the most frequent first, and of these the smallest."""
        if self._shapes is None:
            return {Shape(self.resolution, self.resolution): len(self)}
        found, counts = np.unique(self._shapes[self.rows], axis=0, return_counts=True)
        shapes = {Shape(*sides): count for sides, count in zip(found.tolist(), counts.tolist(), strict=True)}
        return dict(sorted(shapes.items(), key=lambda item: (-item[1], item[0].area, item[0])))

    @property
    def shape_numbers(self) -> Indices | None:
        """A number for the shape of each image, int64 (n,), small areas first; None where all have one."""
        numbers = {shape: number for number, shape in enumerate(sorted(self.shapes, key=lambda s: (s.area, s)))}
        if self._shapes is None or len(numbers) == 1:
            return None
        return np.array([numbers[Shape(*sides)] for sides in self._shapes[self.rows].tolist()], dtype=np.int64)

    def checksum(self, index: int) -> int:
        """A hash of an image's pixels and shape."""
        return int(self.table.data.column("checksum")[int(self.rows[index])].as_py())

    def original_size(self, index: int) -> tuple[int, int]:
        """Width and height of an image's picture, before it was resized."""
        columns = (self.table.data.column(f"original_{side}") for side in ("width", "height"))
        width, height = (int(column[int(self.rows[index])].as_py()) for column in columns)
        return width, height

    def select(self, indices: Indices) -> "Images":
        """A view of some of the images, in the order given."""
        labels = None if self.labels is None else self.labels[indices]
        rows = self.rows[indices]
        captions = None if self.captions is None else self.captions.select(indices)
        options = self.channels, self.resolution, labels, self.label_names, self.notes, captions
        return Images(self.table, rows, *options)

    @property
    def class_names(self) -> list[str]:
        """The names of the labels that occur, in the order of their numbers; a label without a name is its number."""
        present = [] if self.labels is None else np.unique(self.labels[self.labels >= 0]).tolist()
        return [self._class_name(label) for label in present]

    def classes(self, class_names: Sequence[str]) -> Indices:
        """The place of each image's class in `class_names`, int64 (n,); every image has to have one of them."""
        places = {name: place for place, name in enumerate(class_names)}
        return np.array([places[name] for name in self.names()], dtype=np.int64)

    def names(self) -> list[str]:
        """What a model is told of each image: its first caption where it has captions, else the name of its class."""
        if self.captions is not None:
            return [self.captions.texts[self.captions.first(image)] for image in range(len(self))]
        assert self.labels is not None
        return [self._class_name(label) for label in self.labels.tolist()]

    def _class_name(self, label: int) -> str:
        return self.label_names[label] if self.label_names is not None else str(label)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all pixels, their order, labels, captions and sizes: the same wherever they are stored."""
        checksums = self.table.data.column("checksum").to_numpy()[self.rows]
        digest = hashlib.blake2b(checksums.astype("<i8").tobytes(), digest_size=16)
        if self.labels is not None:
            digest.update(repr(self.label_names).encode() + self.labels.astype("<i8").tobytes())
        if self.captions is not None:  # models that read them may be told the pictures' sizes
            sizes = [self.table.data.column(f"original_{side}").to_numpy()[self.rows] for side in ("width", "height")]
            digest.update(self.captions.digest + np.stack(sizes).astype("<i8").tobytes())
        return digest.hexdigest()


class Original(NamedTuple):
    """What a picture was before it was decoded."""

    width: int
    height: int
    colour: bool
    several: bool = False  # frames or pages, of which the first is used


def pixel_row(pixels: Pixels, original: Original | None = None) -> Row:
    """The row of an image, uint8 (H, W, C); by default it was the same before it was decoded."""
    data = pixels.transpose(2, 0, 1).tobytes()  # plane by plane, as in a batch: reading is a plain copy
    digest = hashlib.blake2b(repr(pixels.shape).encode() + data, digest_size=8).digest()
    height, width = pixels.shape[:2]
    checksum = int.from_bytes(digest, "little", signed=True)
    original = original or Original(width, height, pixels.shape[2] > 1)
    row: Row = {"pixels": data, "height": height, "width": width, "checksum": checksum, "error": None}
    return row | {f"original_{name}": value for name, value in original._asdict().items()}


def shaped_row(pixels: Pixels, original: Original, shape: Shape) -> Row:
    """The row of an image of which a shape is trained."""
    return pixel_row(pixels, original) | {"shape_height": shape.height, "shape_width": shape.width}


def error_row(reason: str) -> Row:
    """The row of a bad picture."""
    row: Row = {"pixels": b"", "height": 0, "width": 0, "checksum": 0, "error": reason}
    row |= {f"original_{name}": value for name, value in Original(0, 0, False)._asdict().items()}
    return row | {"shape_height": 0, "shape_width": 0}
