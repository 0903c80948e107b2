"""A run's folder: held by one run at a time, and with room for what that run will write."""

import fcntl
import shutil
from pathlib import Path
from typing import IO

from finetune.errors import UserError


class Lock:
    """A run's hold on its folder, until the process ends, however it ends: a crashed owner leaves nothing behind."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self._file: IO | None = None

    def acquire(self) -> None:
        """Make the folder where need be and hold it.

        Raises:
            UserError: if another run holds it, or it cannot be made or written.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self.output_dir / ".lock", "w")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            raise UserError(
                f"output_dir: {self.output_dir}: cannot be written ({error.strerror}); give a folder that can"
            ) from error
        try:
            # Of the process alone: `flock` would live on in data workers for seconds after a kill.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"output_dir: {self.output_dir}: another run is writing here; stop it, or give another output_dir"
            ) from error


def require_room(output_dir: Path, needed: int, what: str) -> None:
    """Compare what a run will write with what is free, before anything is written; a quota is not seen.

    Args:
        needed: bytes, on top of what is there already.

    Raises:
        UserError: if that is more than is free.
    """
    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output_dir: {output_dir}: found {free:,} bytes free, expected {needed:,} for {what}; free some, give an "
            "output_dir on a larger disk, or set a smaller checkpoint.keep"
        )
