"""A run's output folder: locked by one run at a time, with enough free disk space."""

import contextlib
import errno
import fcntl
import os
import socket
import time
import uuid
from pathlib import Path

from finetune.core.distributed import on_main_process, printed_once
from finetune.core.errors import UserError
from finetune.core.files import writing
from finetune.core.groups import gathered, processes

CACHE_SECONDS = 40.0  # NFS may keep what it knows of a folder for 30 s


def check_folder(output_dir: Path) -> None:
    """Raises UserError if a folder could not be created or written, as taking its `Lock` would. Creates nothing."""
    path = output_dir.absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise UserError(
            f"output_dir: {output_dir}: found the file {existing}; expected a folder, or a name that is free"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        problem = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise _unwritable(output_dir, os.strerror(problem))


def _unwritable(output_dir: Path, reason: str | None) -> UserError:
    return UserError(f"output_dir: {output_dir}: is not writable ({reason}); set a writable folder")


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
            raise _unwritable(output_dir, error.strerror) from error
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


def require_shared(output_dir: Path) -> None:
    """Check that every process sees the same output folder. Called by all processes, after the main one locked it.

    Without this a run over several hosts with a folder each would end well, and could never be resumed: each process
    loads its checkpoint from there.

    Raises:
        UserError: on all processes, with the hosts that do not see what the main process wrote.
    """
    if processes().num_processes == 1:
        return
    name = f".shared-{uuid.uuid4().hex}"  # a name nobody looked up before, so that no cache of NFS can deny it
    token = on_main_process(lambda: _write_token(output_dir, name))
    sees = gathered((_sees(output_dir / token), socket.gethostname()))
    if processes().is_main_process:
        (output_dir / token).unlink(missing_ok=True)
    if blind := sorted({host for seen, host in sees if not seen}):
        raise printed_once(
            UserError(
                f"output_dir: {output_dir}: {', '.join(blind)} cannot see the files that {sees[0][1]} writes there, so "
                "the run could not be resumed; set a folder on a shared file system"
            )
        )


def _write_token(output_dir: Path, name: str) -> str:
    with writing(output_dir / name):
        (output_dir / name).touch(exist_ok=False)
    return name


def _sees(token: Path) -> bool:
    """Whether a file exists; listing its folder, and some patience, refreshes what a network file system cached."""
    end = time.monotonic() + CACHE_SECONDS
    while not token.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(token.parent)
    return True
