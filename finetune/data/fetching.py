"""Shards behind a URL, fetched into the cache once; from then on they are read as files of this machine.

A shard has its name in the cache only when it is complete, so an interrupted run fetches what is missing, and a shard
that changes at its source is fetched again.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from fsspec.callbacks import Callback
from tqdm import tqdm

from finetune.core.distributed import on_main_process, together
from finetune.core.errors import UserError
from finetune.core.files import LARGER_CACHE, exclusive, require_room
from finetune.core.groups import processes
from finetune.data.remote import Shard, connected, is_url, list_shards, named, reaching, state

STREAMS = 4  # shards that a process fetches at a time


def fetch_together(source: str) -> None:
    """Fetch the shards of a source, if it is a URL; the processes share the work. Called by all of them.

    One process alone fetches them when it opens the source.

    Raises:
        UserError: on all processes, if any of them raised it.
    """
    shared = processes()
    if is_url(source) and shared.num_processes > 1:
        shards, _ = on_main_process(lambda: list_shards(source))
        together(lambda: fetch(source, shards, shared.process_index, shared.num_processes))


def fetch(source: str, shards: Sequence[Shard], process: int = 0, processes: int = 1) -> None:
    """Fetch this process's share of some shards of a source, but for those that the cache has.

    Raises:
        UserError: one line: no room, no access, a shard that is gone, was cut off, or changed meanwhile.
    """
    mine = [shard for shard in shards[process::processes] if not shard.fetched]
    if not mine:
        return
    needed, cache = sum(shard.size for shard in shards if not shard.fetched), Path(datasets.config.HF_DATASETS_CACHE)
    require_room(f"data.source: {named(source)}: {cache}", cache, needed, "its shards", LARGER_CACHE)
    title, total = f"Fetching {len(mine)} shards", sum(shard.size for shard in mine)
    with (
        reaching(source),
        tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=process > 0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(STREAMS) as threads,
    ):
        system, _ = connected(source)
        progress = _Progress(bar)
        try:
            for _ in threads.map(partial(_fetch, system, progress), mine):
                pass
        except BaseException:  # a failed shard, Ctrl-C: the other threads end at their next block
            progress.stopped = True
            threads.shutdown(cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Ends a thread because another one failed."""


class _Progress(Callback):
    """Of all shards that a process fetches, in bytes."""

    def __init__(self, bar: Any):
        super().__init__()
        self.bar, self.stopped = bar, False

    def relative_update(self, inc: int = 1) -> None:
        if self.stopped:
            raise _StoppedError
        self.bar.update(inc)

    def branched(self, *_: Any, **__: Any) -> "_Progress":
        return self


def _fetch(system: Any, progress: _Progress, shard: Shard) -> None:
    folder = os.path.dirname(shard.path)
    with exclusive(folder):  # another run that fetches the same waits; a killed one's half is removed
        if progress.stopped or shard.fetched:
            return
        half = os.path.join(folder, "tmp-half")
        before = _present_state(system, shard)  # a listing may tell it in other words
        system.get_file(shard.address, half, callback=progress)
        if (size := os.path.getsize(half)) != shard.size:
            raise UserError(
                f"data.source: {named(shard.address)} was cut off: found {size:,} bytes, expected {shard.size:,}; run "
                "the same command again: shards that are complete stay",
                exit_code=1,
            )
        if _present_state(system, shard) != before:
            raise UserError(
                f"data.source: {named(shard.address)} changed while it was read; run the same command again when "
                "nobody writes there",
                exit_code=1,
            )
        os.replace(half, shard.path)


def _present_state(system: Any, shard: Shard) -> str:
    system.invalidate_cache()
    return state(system.info(shard.address))
