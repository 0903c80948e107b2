"""Checkpoints: whole or not there, found again, and never in each other's way.

A checkpoint is written under a temporary name by all processes, synced to disk, given its manifest last, and renamed;
only then are older ones pruned. A folder without a manifest that its files match does not exist for resuming.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import xxhash
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config import UserError
from finetune.launch import problems_anywhere

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL, _PRUNED = ".checkpoint.partial", ".checkpoint.pruned"


@dataclass
class RunState:
    """Where a run is. Everything else about its place (epoch, window, learning rate) follows from the step."""

    step: int = 0  # windows done; each is an update, but for those skipped
    skipped: int = 0  # windows whose update was not applied: overflow under fp16, or a loss that was not finite
    skipped_in_a_row: int = 0
    validated: int = -1  # the step of the last complete validation
    sampled: int = -1  # the step of the last complete sample grid
    seconds: float = 0.0  # of training, over all starts

    @property
    def updates(self) -> int:
        """Updates that moved the weights, which is what the schedule and the moving average count."""
        return self.step - self.skipped


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
        for rest in (_PARTIAL, _PRUNED):  # of an owner that was killed while saving
            shutil.rmtree(self.output_dir / rest, ignore_errors=True)


def share_weights_between_setups(accelerator: Accelerator) -> None:
    """Have `save_state` name weights as the bare network does, without the prefixes of DDP and of a compiled module.

    Accelerate saves a wrapped network's names as they are: a checkpoint of two processes would not load in one.
    """

    def bare(model):
        return accelerator.unwrap_model(model, keep_torch_compile=False)

    def before_save(models, weights, output_dir):
        weights[:] = [bare(model).state_dict() for model in models[: len(weights)]]

    def before_load(models, input_dir):
        models[:] = [bare(model) for model in models]

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def save(
    accelerator: Accelerator,
    output_dir: Path,
    step: int,
    run_state: dict,
    tensors: dict[str, dict[str, Tensor]],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>`; all processes call it together.

    Args:
        run_state: JSON beside the weights: where the run is, and which run it is.
        tensors: further named groups of tensors, each written as `<group>.safetensors`.
        keep: how many whole checkpoints stay, this one included.

    Raises:
        UserError: if any process could not write. What was there before is untouched, nothing is left behind.
    """
    folder, partial = output_dir / f"checkpoint-{step}", output_dir / _PARTIAL

    def write() -> None:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            for group, named in tensors.items():
                save_file(named, partial / f"{group}.safetensors")
            (partial / RUN_STATE).write_text(json.dumps(run_state, indent=2), encoding="utf-8")

    def publish() -> None:
        if accelerator.is_main_process:
            _write_manifest(partial, step)
            if folder.exists():  # one that resuming passed over
                shutil.rmtree(folder)
            partial.rename(folder)
            _sync(output_dir)

    for stage in (write, publish):
        problems = problems_anywhere(stage)
        if problems:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(*(f"{folder}: not saved: {problem}" for problem in problems), exit_code=1)
    if accelerator.is_main_process:
        for old in _by_step(output_dir)[keep:]:
            pruned = old.rename(output_dir / _PRUNED)  # first out of sight: half of one is none
            shutil.rmtree(pruned, ignore_errors=True)
    return folder


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
        _sync(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flaw(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in a few words; None where each file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if _checksum(file) != expected["xxh3_128"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    unlisted = {file.name for file in folder.iterdir()} - set(files) - {MANIFEST}
    return f"{min(unlisted)} is not in its {MANIFEST}" if unlisted else None


def find(output_dir: Path, resume: str, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None to start; `resume` is auto, never, or a checkpoint's folder.

    Raises:
        UserError: if the one asked for is not whole, none of those that exist is, or `never` meets a run's checkpoints.
    """
    existing = _by_step(output_dir)
    if resume == "never":
        if existing:
            raise UserError(
                f"checkpoint.resume: never, but {output_dir} holds {existing[0].name}: starting again would mix two "
                "runs; give another output_dir, or delete this one"
            )
        return None
    if resume != "auto":
        if reason := flaw(Path(resume)):
            raise UserError(f"checkpoint.resume: {resume} is not a whole checkpoint: {reason}")
        return Path(resume)
    for folder in existing:
        reason = flaw(folder)
        if reason is None:
            return folder
        warn(f"{folder} is passed over: {reason}")
    if existing:
        raise UserError(
            f"checkpoint.resume: auto, but none of the {len(existing)} checkpoints in {output_dir} is whole (see "
            "above); restore one, or delete them to start again"
        )
    return None


def _by_step(output_dir: Path) -> list[Path]:
    """The checkpoints' folders, newest first, whole or not."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_run_state(folder: Path) -> dict:
    """The run state of a whole checkpoint."""
    return json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))


def load(accelerator: Accelerator, folder: Path) -> None:
    """Put Accelerate's state back: network, optimizer, scaler, generators. Called by all processes.

    Checkpoints end at a window's end, where Accelerate's micro-step counter starts anew; the saved one counts in the
    accumulation steps of the run that saved it.
    """
    scaler = accelerator.scaler
    if scaler is not None and not (folder / "scaler.pt").exists():
        accelerator.scaler = None  # saved in another precision: this one starts with a fresh scale
    try:
        accelerator.load_state(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: refused: {str(error).splitlines()[0]}") from error
    finally:
        accelerator.scaler = scaler
    accelerator.step = 0


def load_tensors(folder: Path, group: str) -> dict[str, Tensor]:
    """One of the named groups given to `save`."""
    return load_file(folder / f"{group}.safetensors")


def differences(saved: dict, current: dict) -> list[str]:
    """What two nested mappings do not share, one phrase a key: `optimizer.eps: 1e-08 in the checkpoint, 1e-06 now`."""
    found = []
    for key in dict.fromkeys([*saved, *current]):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{key}.{phrase}" for phrase in differences(before, now)]
        elif before != now:
            found.append(f"{key}: {before!r} in the checkpoint, {now!r} now")
    return found
