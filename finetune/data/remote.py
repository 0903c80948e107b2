"""Shards behind a URL, fetched once into the cache and from then on read as files of this machine.

Whatever fsspec opens: s3://, gs://, hf://, https://, file://. Cache path:
HF_DATASETS_CACHE/shards/<address, size and ETag>/<name>. A shard has that name only when it is complete, so an
interrupted run fetches what is missing, and a shard that changes at its source is fetched again.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import datasets
import fsspec
from fsspec.callbacks import Callback
from tqdm import tqdm

from finetune.core.distributed import on_main_process, together
from finetune.core.errors import UserError, first_line
from finetune.core.groups import processes
from finetune.data.cache import exclusive
from finetune.data.listing import READERS, by_kind

SHARDS = {extension for extension, reader in READERS.items() if reader != "imagefolder"}
STREAMS = 4  # shards that a process fetches at a time
STATES = (
    "ETag",
    "etag",
    "blob_id",
    "md5Hash",
    "mtime",
    "LastModified",
    "Last-Modified",
    "created",
)  # what back-ends tell of contents


class Shard(NamedTuple):
    """A file behind a URL."""

    address: str  # as its file system names it
    relative: str  # to the URL
    size: int  # bytes
    state: str  # another one is another content; empty where the server tells none

    @property
    def path(self) -> str:
        """Where it lies in the cache, once it is complete."""
        key = hashlib.blake2b(repr((self.address, self.size, self.state)).encode(), digest_size=8).hexdigest()
        name = self.address.partition("?")[0].rsplit("/", 1)[-1]
        return os.path.join(datasets.config.HF_DATASETS_CACHE, "shards", key, name)

    @property
    def reader(self) -> str:
        return READERS[_extension(self.address)]

    @property
    def fetched(self) -> bool:
        return os.path.isfile(self.path) and os.path.getsize(self.path) == self.size


def is_url(source: str) -> bool:
    return "://" in source


def list_shards(source: str) -> tuple[list[Shard], list[str]]:
    """The shards that a URL names: a file, those that match a pattern with *, or those in and below a folder.

    Returns:
        The shards, sorted, and notes on what was left out.

    Raises:
        UserError: one line: no back-end, no such URL, no access, no shards, shards of two kinds, no size told.
    """
    with _reaching(source):
        system, root = _connected(source)
        if _extension(root) in SHARDS and "*" not in root:
            found = {root: system.info(root)}  # whether it is a folder is not asked: over HTTP that would read it
        else:
            found = system.glob(root, detail=True) if "*" in root else system.find(root, detail=True)
        files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
        kept = {name: info for name, info in files.items() if _extension(name) in SHARDS}
        if not kept:
            raise UserError(
                f"data.source: found {by_kind(files) or 'nothing'} at {_named(source)}; expected "
                f"{', '.join(sorted(SHARDS))} files: pictures are to be packed into such, or copied to this machine"
            )
        if len({READERS[_extension(name)] for name in kept}) > 1:
            raise UserError(f"data.source: found {by_kind(kept)} at {_named(source)}; expected files of one kind")
        base = os.path.commonpath([os.path.dirname(name) for name in kept])
        shards = [_shard(system, name, os.path.relpath(name, base), info) for name, info in kept.items()]
    left_out = [name for name in files if name not in kept]
    notes = [f"left out {len(left_out)} other files at {_named(source)}: {by_kind(left_out)}"] if left_out else []
    return shards, notes


def fetch_together(source: str) -> None:
    """Fetch the shards of a source, if it is a URL; the processes share the work. Called by all of them.

    Raises:
        UserError: on all processes, if any of them raised it.
    """
    if is_url(source):
        shards, _ = on_main_process(lambda: list_shards(source))
        shared = processes()
        together(lambda: fetch(source, shards, shared.process_index, shared.num_processes))


def fetch(source: str, shards: Sequence[Shard], process: int = 0, processes: int = 1) -> None:
    """Fetch this process's share of some shards of a source, but for those that the cache has.

    Raises:
        UserError: one line: no room, no access, a shard that is gone, was cut off, or changed meanwhile.
    """
    mine = [shard for shard in shards[process::processes] if not shard.fetched]
    if not mine:
        return
    _require_room(source, sum(shard.size for shard in shards if not shard.fetched))
    title, total = f"Fetching {len(mine)} shards", sum(shard.size for shard in mine)
    with (
        _reaching(source),
        tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=process > 0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(STREAMS) as threads,
    ):
        system, _ = _connected(source)
        progress = _Progress(bar)
        try:
            for _ in threads.map(partial(_fetch, system, progress), mine):
                pass
        except BaseException:  # a failed shard, Ctrl-C: the other threads end at their next block
            progress.stopped = True
            threads.shutdown(cancel_futures=True)
            raise


def _connected(source: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL as it names it."""
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp  # only these need it

        # It would give up a shard that takes longer than five minutes.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}
    system, root = fsspec.core.url_to_fs(source, **options)
    return system, root


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
                f"data.source: {_named(shard.address)} was cut off: found {size:,} bytes, expected {shard.size:,}; run "
                "the same command again: shards that are complete stay",
                exit_code=1,
            )
        if _present_state(system, shard) != before:
            raise UserError(
                f"data.source: {_named(shard.address)} changed while it was read; run the same command again when "
                "nobody writes there",
                exit_code=1,
            )
        os.replace(half, shard.path)


def _present_state(system: Any, shard: Shard) -> str:
    system.invalidate_cache()
    return _state(system.info(shard.address))


def _shard(system: Any, name: str, relative: str, info: dict[str, Any]) -> Shard:
    if info.get("size") is None or not _state(info):
        info = system.info(name)  # a listing over HTTP has names alone
    if info.get("size") is None:
        raise UserError(
            f"data.source: found no size of {_named(name)}; expected a server that tells it (Content-Length), or a "
            "copy on this machine"
        )
    return Shard(name, relative, int(info["size"]), _state(info))


def _state(info: dict[str, Any]) -> str:
    """The first of STATES that a back-end tells."""
    return next((f"{key} {info[key]}" for key in STATES if info.get(key) is not None), "")


def _extension(name: str) -> str:
    return os.path.splitext(name.partition("?")[0])[1].lower()


def _named(source: str) -> str:
    """An address without the secrets that it may have: a user's password, a signature."""
    return re.sub(r"//[^/@]*@", "//", source.partition("?")[0])


def _require_room(source: str, needed: int) -> None:
    cache = datasets.config.HF_DATASETS_CACHE
    os.makedirs(cache, exist_ok=True)
    if (free := shutil.disk_usage(cache).free) < needed:
        raise UserError(
            f"data.source: {_named(source)}: found {free:,} bytes free in the datasets cache {cache}, expected "
            f"{needed:,} for its shards; free some, or set HF_DATASETS_CACHE to a larger disk"
        )


@contextmanager
def _reaching(source: str) -> Iterator[None]:
    """Turns what back-ends raise into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each back-end has errors of its own
        kind = type(error).__name__
        detail = _named(first_line(error).replace(source, _named(source)))
        if isinstance(error, ImportError):
            advice = f"a package that this protocol needs is not installed ({detail}): pip install it"
        elif isinstance(error, FileNotFoundError):
            advice = f"found nothing there, or no longer ({detail}); check the address"
        elif isinstance(error, PermissionError) or "Credential" in kind:
            advice = (
                f"no access ({kind}: {detail}); set the credentials that its back-end reads, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY for s3://, HF_TOKEN for hf://"
            )
        elif isinstance(error, ValueError) and "Protocol not known" in detail:
            advice = f"{detail}; expected one that fsspec knows, as s3://, gs://, hf://, https://, file://"
        else:
            advice = f"cannot be read ({kind}: {detail}); check the address and the network, and run it again"
        raise UserError(f"data.source: {_named(source)}: {advice}") from error
