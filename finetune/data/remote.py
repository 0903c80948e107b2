"""Lists the shards behind a URL, and turns the errors of back-ends into one line.

Whatever fsspec opens: s3://, gs://, hf://, https://, file://. Cache path of a shard:
HF_DATASETS_CACHE/shards/<address, size and ETag>/<name>
"""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import datasets
import fsspec

from finetune.core.errors import UserError, first_line
from finetune.data.listing import READERS, by_kind

SHARDS = {extension for extension, reader in READERS.items() if reader != "imagefolder"}
FULL = errno.ENOSPC, errno.EDQUOT
# What back-ends tell of a file's content, the most telling first.
STATES = "ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "Last-Modified", "created"


class Shard(NamedTuple):
    """A file behind a URL."""

    address: str  # as its file system names it
    relative: str  # to the URL
    size: int  # bytes
    state: str  # changes when the content does; empty if the server reports none

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
    with reaching(source):
        system, root = connected(source)
        if _extension(root) in SHARDS and "*" not in root:
            found = {root: system.info(root)}  # whether it is a folder is not asked: over HTTP that would read it
        else:
            found = system.glob(root, detail=True) if "*" in root else system.find(root, detail=True)
        files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
        kept = {name: info for name, info in files.items() if _extension(name) in SHARDS}
        if not kept:
            raise UserError(
                f"data.source: found {by_kind(files) or 'nothing'} at {named(source)}; expected "
                f"{', '.join(sorted(SHARDS))} files: pack the pictures into these, or copy them to this machine"
            )
        if len({READERS[_extension(name)] for name in kept}) > 1:
            raise UserError(f"data.source: found {by_kind(kept)} at {named(source)}; expected files of one kind")
        base = os.path.commonpath([os.path.dirname(name) for name in kept])
        shards = [_shard(system, name, os.path.relpath(name, base), info) for name, info in kept.items()]
    left_out = [name for name in files if name not in kept]
    notes = [f"left out {len(left_out)} other files at {named(source)}: {by_kind(left_out)}"] if left_out else []
    return shards, notes


def _shard(system: Any, name: str, relative: str, info: dict[str, Any]) -> Shard:
    if info.get("size") is None or not state(info):
        info = system.info(name)  # a listing over HTTP has names alone
    if info.get("size") is None:
        raise UserError(
            f"data.source: found no size of {named(name)}; expected a server that tells it (Content-Length), or a "
            "copy on this machine"
        )
    return Shard(name, relative, int(info["size"]), state(info))


def connected(source: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL as it names it."""
    options: dict[str, Any] = {}
    if source.startswith(("http://", "https://")):
        import aiohttp  # only these need it

        # It would give up a shard that takes longer than five minutes.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)}
    system, root = fsspec.core.url_to_fs(source, **options)
    return system, root


def state(info: dict[str, Any]) -> str:
    """What stands for a file's content: the first of STATES that a back-end tells."""
    return next((f"{key} {info[key]}" for key in STATES if info.get(key) is not None), "")


def _extension(name: str) -> str:
    return os.path.splitext(name.partition("?")[0])[1].lower()


def named(source: str) -> str:
    """An address without the secrets that it may have: a user's password, a signature."""
    return re.sub(r"//[^/@]*@", "//", source.partition("?")[0])


@contextmanager
def reaching(source: str) -> Iterator[None]:
    """Turns what back-ends raise into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each back-end has errors of its own
        kind, cache = type(error).__name__, datasets.config.HF_DATASETS_CACHE
        detail = named(first_line(error).replace(source, named(source)))
        if isinstance(error, ImportError):
            advice = f"a package that this protocol needs is not installed ({detail}): pip install it"
        elif isinstance(error, OSError) and (error.errno in FULL or str(error.filename).startswith(str(cache))):
            advice = (
                f"no room in the datasets cache, or it cannot be written ({detail}); set HF_DATASETS_CACHE to another"
            )
        elif isinstance(error, FileNotFoundError):
            cause = f": {type(error.__cause__).__name__}" if error.__cause__ else ""  # over HTTP, that nobody answers
            found = f"found nothing there, or it cannot be reached ({detail}{cause})"
            advice = f"{found}; check the address and the network"
        elif isinstance(error, PermissionError) or "Credential" in kind:
            advice = (
                f"no access ({kind}: {detail}); set the credentials that its back-end reads, as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY for s3://, HF_TOKEN for hf://"
            )
        elif isinstance(error, ValueError) and "Protocol not known" in detail:
            advice = f"{detail}; expected one that fsspec knows, as s3://, gs://, hf://, https://, file://"
        else:
            advice = f"cannot be read ({kind}: {detail}); check the address and the network, and run it again"
        raise UserError(f"data.source: {named(source)}: {advice}") from error
