"""A run's output folder: locked by one run at a time, with enough free disk space."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path

from finetune.core.errors import UserError


class Lock:
    """An exclusive lock on a folder, created if need be; released by the OS when the process exits.

    The file `.lock` says which process holds it.
    """

    def __init__(self, output_dir: Path):
        """Raises UserError if another run holds the lock, or the folder cannot be created, written or locked."""
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(output_dir / ".lock", "a+")  # noqa: SIM115 - open for the life of the run
        except OSError as error:
            raise UserError(
                f"output_dir: {output_dir}: cannot be written ({error.strerror}); set a folder that can"
            ) from error
        try:
            # Not `flock`: data workers would inherit it, and keep it for seconds after a kill.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"output_dir: {output_dir}: cannot be locked ({error.strerror}); set a folder on a file system "
                    "with file locks"
                ) from error
            raise UserError(
                f"output_dir: {output_dir}: another run is writing here ({self._holder()}); stop it, or set another "
                "output_dir"
            ) from error
        with contextlib.suppress(OSError):  # a full disk is reported where something needs the room
            os.truncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read(200).strip() or "it does not say which process it is"


def require_room(output_dir: Path, needed: int, what: str) -> None:
    """Check free disk space against what a run will write, before anything is written. Does not see quotas.

    Args:
        needed: bytes, on top of what exists already.

    Raises:
        UserError: if there is less.
    """
    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir: {output_dir}: found {free:,} bytes free, expected {needed:,} for {what}; free some, set an "
            "output_dir on a larger disk, or set a smaller checkpoint.keep"
        )
