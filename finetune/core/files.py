"""Writing to a disk safely: files complete or not there, room checked first, one writer, failures in one line."""

import fcntl
import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from finetune.core.errors import UserError

LARGER_CACHE = "or set HF_DATASETS_CACHE to a larger disk"  # the advice of `require_room` on the cache
_RESUME = (
    "free some space or set another output_dir. Complete checkpoints are untouched; run the same command again to "
    "resume from the newest one"
)


@contextmanager
def writing(path: Path, what: str = "", advice: str = _RESUME) -> Iterator[None]:
    """Turn a failure to write a file or folder into one line that names it.

    Args:
        what: begins the line, before the path.
        advice: what to do; without it that for a run's own files.

    Raises:
        UserError: if it could not be written (a full disk, a quota, a read-only file system).
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:
                raise
            reason = "torch.save failed"  # its own message gives positions in a file
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} bytes are free there"
        raise UserError(f"{what}{path}: cannot be written ({reason}{free}); {advice}", exit_code=1) from error


def require_room(what: str, folder: Path, needed: int, content: str, advice: str) -> None:
    """Check free disk space before anything is written. Does not see quotas.

    Args:
        what: the setting or the work that needs it, and where; begins the line.
        folder: where it will be written; need not exist.
        needed: bytes, on top of what exists already.
        content: of these bytes.
        advice: what to do other than to free some.

    Raises:
        UserError: if there is less.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{what}: found {free:,} bytes free, expected {needed:,} for {content}; free some, {advice}")


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A temporary path to write to. It replaces the file when the block succeeds and is removed when it fails."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        try:
            yield partial
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Exclusive lock on a cache folder: another run that needs it waits, and finds it filled.

    What begins with `tmp` in it is unfinished, and removed.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        try:
            _remove_partial(folder)  # of a killed run
            yield
        finally:
            _remove_partial(folder)  # `datasets` leaves its file behind when the disk is full


def _remove_partial(folder: str) -> None:
    for unfinished in glob.glob(os.path.join(glob.escape(folder), "tmp*")):
        os.remove(unfinished)


def permit(files: Iterable[Path]) -> None:
    """Give files the permissions that new files of this process have: safetensors makes them for their owner alone.

    Nobody else in a shared folder could resume, load or share what a run leaves.
    """
    umask = os.umask(0o077)  # can be read only by setting it
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)
