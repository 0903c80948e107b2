"""A config and a run of it that nothing disturbed: what the runs of a test module are compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.configs import of_kind, tiny_config, write_config, write_pictures
from harness.faults import skip_the_export
from harness.processes import finish


def undisturbed(
    base: Path,
    images: int,
    size: tuple[int, int] = (8, 8),
    kind: str = "unconditional",
    overrides: tuple[str, ...] = (),
    before: Callable[[], None] = skip_the_export,
    **changes: Any,
) -> Path:
    """`base` with pictures/, config.yaml (of `tiny_config` and its changes) and run/, the finished run of it."""
    pictures = write_pictures(base / "pictures", images, size, kind)
    config = tiny_config(pictures, base / "run", **of_kind(kind, pictures) | changes)
    finish("--config", write_config(base / "config.yaml", config), *overrides, folder=base, before=before)
    return base


def command(base: Path, output_dir: Path, *overrides: str) -> list[str | Path]:
    """The arguments of another run of the config in `base`."""
    return ["--config", base / "config.yaml", f"output_dir={output_dir}", *overrides]
