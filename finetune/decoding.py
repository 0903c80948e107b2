"""Pictures decoded once: rows of a dataset, converted by all cores and kept in the cache of `datasets`.

Where they lie: HF_DATASETS_CACHE/pixels/<source and options>/<rows>.arrow
"""

import fcntl
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import datasets
import numpy as np
import pyarrow as pa

PIECE = 4096  # pictures decoded between two savings of the cache: what an interruption can cost
BATCH_ROWS, BATCH_BYTES = 128, 2**25  # pictures and their pixels decoded between two writes


def decoded(
    dataset: datasets.Dataset,
    column: str,
    rows: np.ndarray,
    decode: Callable[[dict | None], dict],
    features: datasets.Features,
    identity: str,
    size: int,
) -> datasets.Dataset:
    """The given rows of a dataset, decoded. Read from the cache where it has them.

    Args:
        column: holds {"bytes", "path"} of an encoded picture, or None.
        decode: makes a row of it; its `error` tells why a picture is bad. Called by a thread for every core.
        features: of the rows that `decode` makes.
        identity: all that the result depends on beside the dataset.
        size: about how many bytes of pixels an image has.

    The rows come in pieces. Each is saved when it is done, so that an interrupted run goes on with the next. Threads do
    as well as processes, since decoding lets go of Python's lock, and unlike those of `map(num_proc=...)` they start at
    once, fork no process that talks to a GPU, and leave nobody behind when the run is killed.
    """
    # The key is not left to `datasets`, whose own is a hash of bytecode and of all options of `map`.
    key = _hash(repr((dataset._fingerprint, column, identity)).encode())
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels", key)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pieces = np.array_split(rows, -(-len(rows) // max(PIECE, len(rows) // 64)))
    tables = []
    with _alone_in(folder), ThreadPoolExecutor(cores) as threads:

        def decode_batch(images: list[dict | None]) -> dict[str, list]:
            batch = list(threads.map(decode, images))
            return {name: [row[name] for row in batch] for name in features}

        for number, chosen in enumerate(pieces, 1):
            piece, name = dataset.select_columns(column).select(chosen), _hash(chosen.astype("<i8").tobytes())
            convert = partial(
                piece.map,
                decode_batch,
                batched=True,
                batch_size=max(4 * cores, min(BATCH_BYTES // size, BATCH_ROWS)),
                input_columns=[column],
                remove_columns=[column],
                features=features,
                new_fingerprint=f"{key}-{name}",
                # Named, else `map` writes beside the source's own files, or keeps what it makes in memory.
                cache_file_name=os.path.join(folder, f"{name}.arrow"),
                desc="Decoding images" + (f" ({number}/{len(pieces)})" if len(pieces) > 1 else ""),
            )
            tables.append(_current(convert, piece[column], decode))
    return datasets.concatenate_datasets(tables)


def _current(
    convert: Callable[..., datasets.Dataset], images: Sequence[dict | None], decode: Callable[[dict | None], dict]
) -> datasets.Dataset:
    """What the cache has of a piece, or a new conversion if that is damaged or a bad picture has been mended.

    (Mended so that nothing tells: by `chmod`, or because a network disk came back.)
    """
    try:
        table = convert(load_from_cache_file=True)
        bad = np.flatnonzero(table.data.column("error").is_valid().to_numpy())
        if len(table) == len(images) and all(decode(images[int(row)])["error"] for row in bad):
            return table
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk's fault and not the file's
            raise
    return convert(load_from_cache_file=False)


@contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """A folder to ourselves: another run that wants the same waits, and finds it filled. Leaves no unfinished files."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            _sweep(folder)  # after one that was killed
            yield
        finally:
            _sweep(folder)  # `map` leaves its file behind when the disk is full


def _sweep(folder: str) -> None:
    for unfinished in glob.glob(os.path.join(glob.escape(folder), "tmp*")):
        os.remove(unfinished)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
