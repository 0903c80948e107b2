"""Operations of a network are counted once for all tests, which spares a forked run up to a third of its time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from finetune.core.kind import Kind
from finetune.core.shapes import Shape
from finetune.models.unet import settings_of
from finetune.training import compute


def remember_flops() -> None:
    """In this process: what a run has counted of a network and shape is read, and what none has is kept for others.

    Only where COUNTED_FLOPS names a folder for it, as in the tests and not in benchmarks.
    """
    if folder := os.environ.get("COUNTED_FLOPS"):
        compute._flops = _remembered(compute._flops, Path(folder))


def _remembered(count: Callable[[Kind, Shape], int], folder: Path) -> Callable[[Kind, Shape], int]:
    def flops(kind: Kind, shape: Shape) -> int:
        network = [type(kind.network), settings_of(kind.network), sorted(kind.trainable()), shape]
        file = folder / hashlib.sha256(repr(network).encode()).hexdigest()
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(str(count(kind, shape)))
            partial.rename(file)
        return int(file.read_text())

    return flops
