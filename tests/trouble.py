"""Runs that have to give up, as quick as a test wants them, and what each of them leaves behind."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401 - so that no fork need import it
import scripted
from scripted import Outcome, Script, nothing

from finetune import checkpoint, compute


def _quick(before: Callable, *arguments: int) -> None:
    gc.freeze()  # what the tests hold need not be searched when the run ends
    compute.flops_per_image = lambda unet: 1  # takes as long as the training here
    before(*arguments)


def script(*arguments: str | Path, folder: Path, before: Callable = nothing, **environment: str) -> Outcome:
    """train.py to its end."""
    return scripted.script(*arguments, folder=folder, before=partial(_quick, before), **environment)


def two(
    *arguments: str | Path, folder: Path, before: Callable = lambda process: None, **environment: str
) -> list[Script]:
    """train.py on two processes."""
    return scripted.two(*arguments, folder=folder, before=partial(_quick, before), **environment)


def said(outcome: Outcome, code: int) -> str:
    """The one line that a run which failed says."""
    assert outcome.returncode == code, outcome
    assert "Traceback" not in outcome.stderr
    assert len(outcome.errors) == 1, outcome
    assert outcome.stderr.endswith(outcome.errors[0] + "\n")  # the last thing said, and a single line
    return outcome.errors[0].removeprefix("error: ")


def whole(run: Path) -> list[int]:
    """The steps of a run's checkpoints, each of them whole, in a folder without half-written files."""
    saved = list(run.glob("checkpoint-*"))
    assert [checkpoint.flaw(folder) for folder in saved] == [None] * len(saved)
    assert [path for path in run.rglob("*") if path.name.endswith((".partial", ".pruned", ".tmp"))] == []
    return sorted(int(folder.name.split("-")[1]) for folder in saved)
