"""Pixels that were decoded once: how they come into the cache of `datasets`, and how they are read from it.

They lie in HF_DATASETS_CACHE/pixels as raw bytes in arrow files, are mapped into memory, and only copied into a batch.
So a run has no more images in its own memory than it is working on, and all its workers share one page cache.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence

import datasets
import numpy as np

FORMAT = 1  # part of the cache's key: raise it with every change of what is made of a picture
FEATURES = datasets.Features(
    pixels=datasets.Value("large_binary"),  # channels x height x width bytes; none of a bad picture
    height=datasets.Value("int32"),
    width=datasets.Value("int32"),
    checksum=datasets.Value("int64"),  # of shape and pixels
    error=datasets.Value("string"),  # why a picture is bad
)
PIECE = 4096  # pictures decoded between two savings of the cache: what an interruption can cost
PARALLEL_BYTES = 2**27  # of encoded pictures, about two seconds' work: below that, processes take longer to start
BYTES_ALIKE = 2**15  # what the work on a picture of no size would be the decoding of
WRITE_BYTES = 2**25  # of pixels that a process collects before it writes them


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


def decoded(
    dataset: datasets.Dataset,
    column: str,
    rows: np.ndarray,
    decode: Callable[[dict | None], dict],
    identity: str,
    size: int,
) -> datasets.Dataset:
    """The given rows of a dataset, decoded, as `FEATURES`. Read from the cache where it has them.

    Args:
        column: holds {"bytes", "path"} of an encoded picture, or None.
        decode: makes a row of it, with `pixel_row` or `error_row`. Called in other processes.
        identity: all that the result depends on beside the dataset.
        size: about how many bytes of pixels an image has.

    The rows come in pieces. Each is saved when it is done, so that an interrupted run goes on with the next.
    """
    pieces = np.array_split(rows, -(-len(rows) // max(PIECE, len(rows) // 64)))
    tables = []
    for number, piece in enumerate(pieces, 1):
        # Not left to `datasets`, whose own key is a hash of the bytecode and of all options of `map`.
        key = repr((FORMAT, dataset._fingerprint, column, identity)).encode() + piece.astype("<i8").tobytes()
        title = "Decoding images" + (f" ({number}/{len(pieces)})" if len(pieces) > 1 else "")
        tables.append(_piece(dataset.select_columns(column).select(piece), column, decode, key, size, title))
    return datasets.concatenate_datasets(tables)


def _piece(
    piece: datasets.Dataset, column: str, decode: Callable[[dict | None], dict], key: bytes, size: int, title: str
) -> datasets.Dataset:
    fingerprint = hashlib.blake2b(key, digest_size=16).hexdigest()

    def mapped(load: bool) -> datasets.Dataset:
        return piece.map(
            decode,
            input_columns=[column],
            remove_columns=[column],
            features=FEATURES,
            num_proc=_processes(piece, column),
            writer_batch_size=min(max(WRITE_BYTES // size, 1), 1000),
            load_from_cache_file=load,
            new_fingerprint=fingerprint,
            # Named, else `map` writes beside the source's own files, or keeps what it makes in memory.
            cache_file_name=os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels", f"{fingerprint}.arrow"),
            desc=title,
        )

    table = mapped(load=True)
    bad = np.flatnonzero(table.data.column("error").is_valid().to_numpy())
    mended = any(decode(piece[int(row)][column])["error"] is None for row in bad)  # in a way that leaves no trace
    return mapped(load=False) if mended else table


def _processes(piece: datasets.Dataset, column: str) -> int | None:
    """One for every core, or None where the pictures are too small to be worth it, judged by a few of them."""
    few = [piece[index][column] or {} for index in range(0, len(piece), -(-len(piece) // 4))]
    bytes_each = sum(_bytes(image.get("bytes"), image.get("path")) for image in few) / len(few)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worth = cores > 1 and (bytes_each + BYTES_ALIKE) * len(piece) > PARALLEL_BYTES
    return min(cores, len(piece)) if worth else None


def _bytes(data: bytes | None, path: str | None) -> int:
    if data is not None:
        return len(data)
    return os.path.getsize(path) if path and os.path.isfile(path) else 0
