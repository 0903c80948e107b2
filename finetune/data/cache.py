"""Pictures decoded once: rows of a dataset, converted by all cores and kept in the cache of `datasets`.

Cache path: HF_DATASETS_CACHE/pixels/<source and options>/<rows>.arrow
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from finetune.core.files import LARGER_CACHE, exclusive, require_room
from finetune.data.order import Indices
from finetune.data.pixels import Encoded, Row

PIECE = 4096  # pictures in a cache file; at most this many are decoded again after an interruption
BATCH_ROWS, BATCH_BYTES = 128, 2**25  # pictures and their pixels decoded between two writes


def decoded(
    dataset: datasets.Dataset,
    column: str,
    rows: Indices,
    decode: Callable[[Encoded | None], Row],
    features: datasets.Features,
    identity: str,
    size: int,
) -> datasets.Dataset:
    """The given rows of a dataset, decoded. Read from the cache where it has them.

    Args:
        column: holds {"bytes", "path"} of an encoded picture, or None.
        decode: makes a row of it; its `error` tells why a picture is bad. Called by a thread for every core.
        features: of the rows that `decode` makes.
        identity: everything besides the dataset that the result depends on.
        size: about how many bytes of pixels an image has.

    Rows are decoded in pieces, each saved when it is complete, so an interrupted run continues with the next. Threads
    are as fast as processes, since decoding releases the interpreter lock, and unlike those of `map(num_proc=...)` they
    start at once, fork no process that uses a GPU, and leave no orphans when the run is killed.

    Raises:
        UserError: if the disk of the cache has too little room for those that it lacks.
    """
    # Our own key: that of `datasets` is a hash of bytecode and of all options of `map`.
    key = _hash(repr((dataset._fingerprint, column, identity)).encode())
    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels", key)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pieces = np.array_split(rows, -(-len(rows) // max(PIECE, len(rows) // 64)))
    names = [_hash(chosen.astype("<i8").tobytes()) for chosen in pieces]
    files = [os.path.join(folder, f"{name}.arrow") for name in names]
    tables = []
    with exclusive(folder), ThreadPoolExecutor(cores) as threads:
        missing = sum(len(chosen) for chosen, file in zip(pieces, files, strict=True) if not os.path.exists(file))
        require_room(f"data.resolution: {folder}", Path(folder), missing * size, "decoded pictures", LARGER_CACHE)

        def decode_batch(images: list[Encoded | None]) -> dict[str, list[Any]]:
            batch = list(threads.map(decode, images))
            return {name: [row[name] for row in batch] for name in features}

        for number, (chosen, name, file) in enumerate(zip(pieces, names, files, strict=True), 1):
            piece = dataset.select_columns(column).select(chosen)
            convert = partial(
                piece.map,
                decode_batch,
                batched=True,
                batch_size=max(4 * cores, min(BATCH_BYTES // size, BATCH_ROWS)),
                input_columns=[column],
                remove_columns=[column],
                features=features,
                new_fingerprint=f"{key}-{name}",
                # Otherwise `map` writes beside the source's own files, or keeps the result in memory.
                cache_file_name=file,
                desc="Decoding images" + (f" ({number}/{len(pieces)})" if len(pieces) > 1 else ""),
            )
            tables.append(_current(convert, piece[column], decode))
    return datasets.concatenate_datasets(tables)


def _current(
    convert: Callable[..., datasets.Dataset], images: Sequence[Encoded | None], decode: Callable[[Encoded | None], Row]
) -> datasets.Dataset:
    """A piece from the cache, converted again if the file is damaged or a bad picture has become readable.

    (A picture can become readable without its name or mtime changing: chmod, a network disk.)
    """
    try:
        table = convert(load_from_cache_file=True)
        bad = np.flatnonzero(table.data.column("error").is_valid().to_numpy())
        if len(table) == len(images) and all(decode(images[int(row)])["error"] for row in bad):
            return table
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the disk fails, not the file
            raise
    return convert(load_from_cache_file=False)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
