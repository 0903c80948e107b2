"""Files that are whole or not there, and what is said where they cannot be written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from finetune.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a file or a folder of a run is written.

    Raises:
        UserError: if it could not be (a full disk, a quota, a read-only one), in one line that names it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if "inline_container" not in reason:
                raise
            reason = "torch.save failed"  # whose own words are of positions in a file
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} bytes are free there"
        raise UserError(
            f"{path}: cannot be written ({reason}{free}); make room, or give another output_dir. Whole checkpoints are "
            "as they were, and the same command goes on from the newest",
            exit_code=1,
        ) from error


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to. It takes the file's place when the block ends, and is removed if the block fails."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        try:
            yield partial
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
