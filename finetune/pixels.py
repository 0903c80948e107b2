"""Decoded pixels: the rows they are kept in, and how they are read.

They lie in arrow files as raw bytes, are mapped into memory, and only copied into a batch. So a run has no more images
in its own memory than it is working on, and all its workers share one page cache.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence

import datasets
import numpy as np

FORMAT = 1  # of cached rows: raise it with every change of what is made of a picture
FEATURES = datasets.Features(
    pixels=datasets.Value("large_binary"),  # channels x height x width bytes; none of a bad picture
    height=datasets.Value("int32"),
    width=datasets.Value("int32"),
    checksum=datasets.Value("int64"),  # of shape and pixels
    error=datasets.Value("string"),  # why a picture is bad
)


class Images(Sequence[np.ndarray]):
    """Decoded images: a view of rows in memory-mapped files, at 16 bytes of memory an image.

    Survives both forking and pickling (to spawned workers): what goes over is paths, not pixels.

    Attributes:
        labels: int64 (n,), -1 for none; None where the source has no labels.
        label_names: the name of label k, where labels have names.
        skipped: "name: reason" of each bad picture that was left out of the source.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        rows: np.ndarray,
        channels: int,
        resolution: int,
        labels: np.ndarray | None = None,
        label_names: list[str] | None = None,
        skipped: Sequence[str] = (),
    ):
        self.table, self.rows, self.channels, self.resolution = table, rows, channels, resolution
        self.labels, self.label_names, self.skipped = labels, label_names, list(skipped)
        self._open()

    def _open(self) -> None:
        """Views of the record batches' own buffers, which `datasets` would copy into Python objects row by row."""
        self._starts, self._batches, start = [], [], 0
        for batch in self.table.data.to_batches():
            pixels = batch.column("pixels")
            _, offsets, data = pixels.buffers()
            offsets = np.frombuffer(offsets, dtype=np.int64)[pixels.offset :]
            heights, widths = (batch.column(name).to_numpy() for name in ("height", "width"))
            self._starts.append(start)
            self._batches.append((data, offsets, heights, widths))
            start += len(batch)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_starts", "_batches")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, C), read-only and not copied; H or W exceed the resolution if crops are random."""
        row = self.rows[index]
        number = bisect_right(self._starts, row) - 1
        data, offsets, heights, widths = self._batches[number]
        row -= self._starts[number]
        shape = (self.channels, heights[row], widths[row])
        return np.ndarray(shape, dtype=np.uint8, buffer=data, offset=offsets[row]).transpose(1, 2, 0)

    def __getitem__(self, index: int) -> np.ndarray:
        """The middle square of one image, uint8 (resolution, resolution, C): what nothing random has touched."""
        pixels, side = self.pixels(index), self.resolution
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        return pixels[top : top + side, left : left + side]

    def select(self, indices: np.ndarray) -> "Images":
        """A view of some of the images, in the order given."""
        labels = None if self.labels is None else self.labels[indices]
        rows = self.rows[indices]
        return Images(self.table, rows, self.channels, self.resolution, labels, self.label_names, self.skipped)

    @property
    def fingerprint(self) -> str:
        """A hash of all pixels, their order and labels: the same wherever and however the same images are stored."""
        checksums = self.table.data.column("checksum").to_numpy()[self.rows]
        digest = hashlib.blake2b(checksums.astype("<i8").tobytes(), digest_size=16)
        if self.labels is not None:
            digest.update(repr(self.label_names).encode() + self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def pixel_row(pixels: np.ndarray) -> dict:
    """The row of an image, uint8 (H, W, C)."""
    data = pixels.transpose(2, 0, 1).tobytes()  # plane by plane, as a batch has them: reading is plain copying
    digest = hashlib.blake2b(repr(pixels.shape).encode() + data, digest_size=8).digest()
    height, width = pixels.shape[:2]
    checksum = int.from_bytes(digest, "little", signed=True)
    return {"pixels": data, "height": height, "width": width, "checksum": checksum, "error": None}


def error_row(reason: str) -> dict:
    """The row of a bad picture."""
    return {"pixels": b"", "height": 0, "width": 0, "checksum": 0, "error": reason}
