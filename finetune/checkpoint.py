"""Checkpoints: whole or not there, found again, and never in each other's way.

A checkpoint is written under a temporary name by all processes, synced to disk, given its manifest last, and renamed;
only then are older ones pruned. A folder without a manifest that its files match does not exist for resuming.
"""

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import load as load_pickle
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from finetune import manifest
from finetune.errors import UserError, first_line
from finetune.files import writing
from finetune.launch import together

RUN_STATE = "run_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_OWN_FILES = re.compile(
    r"(model|ema)\.safetensors|optimizer\.bin|scaler\.pt|random_states_\d+\.pkl|run_state\.json|manifest\.json"
)
_PARTIAL = ".checkpoint.partial"


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
    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / _PARTIAL

    @writing(folder)
    def write() -> None:
        with _summed_once():
            accelerator.save_state(str(temporary))
        if accelerator.is_main_process:
            for group, named in tensors.items():
                save_file(named, temporary / f"{group}.safetensors")
            (temporary / RUN_STATE).write_text(json.dumps(run_state, indent=2), encoding="utf-8")

    @writing(folder)
    def publish() -> None:
        if accelerator.is_main_process:
            manifest.seal(temporary, step)
            if folder.exists():  # one that resuming passed over
                shutil.rmtree(folder)
            temporary.rename(folder)
            manifest.sync(output_dir)

    try:
        together(write)
        together(publish)
    except Exception:  # a data worker's death among them, which torch raises wherever its signal comes
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in _by_step(output_dir)[keep:]:
            _prune(old)
    return folder


@contextlib.contextmanager
def _summed_once() -> Iterator[None]:
    """Inside, `torch.save` leaves out its own slower checksums: the manifest has one of each file."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _prune(old: Path) -> None:
    """Put a checkpoint out of sight at once, since half of one is none, and remove it while training goes on."""
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be removed now goes at the next start
        pruned = old.rename(old.with_name(f".{old.name}.pruned"))
        threading.Thread(target=shutil.rmtree, args=(pruned,), kwargs={"ignore_errors": True}).start()


def _rests(output_dir: Path) -> list[Path]:
    return [*output_dir.glob(_PARTIAL), *output_dir.glob(".checkpoint-*.pruned")]


def remove_rests(output_dir: Path) -> None:
    """Remove what an owner of the folder left that was killed while it saved or pruned."""
    for rest in _rests(output_dir):
        shutil.rmtree(rest, ignore_errors=True)


def room_needed(output_dir: Path, size: int, keep: int, saves: int) -> int:
    """Bytes that `saves` more checkpoints of a size take at the most: an old one goes when the new one is there."""
    free_soon = sum(file.stat().st_size for rest in _rests(output_dir) for file in rest.glob("*"))
    return size * min(saves, max(keep + 1 - len(_by_step(output_dir)), 1)) - free_soon


def flaw(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, in a few words; None where each file is as its manifest says."""
    foreign = [file.name for file in folder.glob("*") if not _OWN_FILES.fullmatch(file.name)]
    return manifest.flaw(folder) or (f"{min(foreign)} is no file of a checkpoint" if foreign else None)


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


@contextlib.contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Inside, a checkpoint is read that may be a stranger's: what is not as expected becomes one clear line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors, torch, json and what reads their contents each raise their own
        raise UserError(
            f"{folder}: refused: found {type(error).__name__} ({first_line(error)}), expected plain tensors and "
            "numbers of this network, as this script saves them; go on from another checkpoint, or give another "
            "output_dir"
        ) from error


def read_run_state(folder: Path) -> dict:
    """The run state of a whole checkpoint."""
    return json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))


def load(accelerator: Accelerator, folder: Path) -> None:
    """Put Accelerate's state back: network, optimizer, scaler, generators. Called by all processes.

    Checkpoints end at a window's end, where Accelerate's micro-step counter starts anew; the saved one counts in the
    accumulation steps of the run that saved it.
    """
    for file in folder.glob("random_states_*.pkl"):
        load_pickle(file)  # of plain values only; `load_state` would pass over one that is not
    scaler = accelerator.scaler
    if scaler is not None and not (folder / "scaler.pt").exists():
        accelerator.scaler = None  # saved in another precision: this one starts with a fresh scale
    try:
        accelerator.load_state(str(folder))
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
