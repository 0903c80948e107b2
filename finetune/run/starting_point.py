"""Where a run starts: found without writing anything, so that `--check` finds what a start would."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import Config
from finetune.core.batch import BatchLayout
from finetune.core.distributed import on_main_process, say
from finetune.core.errors import UserError
from finetune.core.files import require_room
from finetune.core.hosts import require_same
from finetune.core.kind import Kind
from finetune.run import checkpoint
from finetune.run.checkpoints import Checkpoints
from finetune.run.folder import check_folder
from finetune.run.state import Change, Length, RunState, differences, from_json, identity


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the one to resume from; None starts from scratch.
        found: the checkpoints that the output folder held then, to notice another run's.
    """

    checkpoint: Path | None
    length: Length
    identity: dict[str, Any]
    checkpoints: Checkpoints
    found: list[Path]


def find_start(
    config: Config,
    kind: Kind,
    layout: BatchLayout,
    num_images: int,
    data_fingerprint: str,
) -> Start:
    """Find where a run starts. Writes nothing, so that `--check` finds what a start would. Called by all processes.

    Args:
        data_fingerprint: of the images' content.

    Raises:
        UserError: if the checkpoint asked for is not valid, or of another run, or past the length asked for, or if
            the output folder cannot be written or there is too little disk space.
    """
    length = Length.of(config, num_images, layout.global_batch_size)
    own_identity = identity(config, data_fingerprint, kind, layout.global_batch_size)
    require_same(own_identity, _other_files)
    checkpoints = Checkpoints(Path(config.output_dir), config.checkpoint.resume, config.checkpoint.keep)

    def find() -> tuple[Path | None, list[Path]]:
        existing = list(checkpoints.by_step().values())
        folder, step = checkpoints.find(say), 0
        if folder is not None:
            step = _check_same_run(folder, own_identity, length)
        check_folder(checkpoints.output_dir)
        _check_room(config, kind, checkpoints, step, length.total_steps)
        return folder, existing

    folder, existing = on_main_process(find)
    return Start(folder, length, own_identity, checkpoints, existing)


def _other_files(expected: dict[str, Any], found: dict[str, Any], there: str, here: str) -> str | None:
    """Why a host's files make another run of the same config, if they do."""
    changed = [change.key for change in differences(expected, found)]
    if not changed:
        return None
    return (
        f"model: found other files on {there} than on {here}, which differ in {', '.join(changed)}; expected the same "
        "model and images on every host"
    )


def _check_same_run(folder: Path, own_identity: dict[str, Any], length: Length) -> int:
    """The step of a checkpoint, after checking that it belongs to this run and that the run goes at least that far."""
    with checkpoint.untrusted(folder) as files:
        saved = checkpoint.read_run_state(files)
        saved["identity"]["data"].setdefault("order", "full")  # of checkpoints from before there was another
        if changed := differences(saved["identity"], own_identity):
            raise UserError(
                *(f"{folder} is of another run: {change}{_meaning(change)}" for change in changed),
                "set another output_dir to start a new run, or the former values to resume this one",
            )
        step = from_json(RunState, saved["state"]).step
    if step > length.total_steps:
        raise UserError(
            f"training: found a length of {length.total_steps} updates, but {folder} is past it, at step {step}; set "
            f"max_train_steps to {step} or more, or branch off from an earlier checkpoint (checkpoint.resume) into "
            "another output_dir"
        )
    return step


def _meaning(change: Change) -> str:
    """Of a changed hash what it is of."""
    if change.key != "data.fingerprint":
        return ""
    return (
        " (images were added, removed, changed or put in another order by their names, or other settings of data "
        "choose, resize, describe or hold them out)"
    )


def _check_room(config: Config, kind: Kind, checkpoints: Checkpoints, step: int, total_steps: int) -> None:
    every, keep = config.checkpoint.every_steps, config.checkpoint.keep
    weights = sum(weight.numel() * weight.element_size() for weight in kind.trainable().values())
    size = weights * (4 if config.ema.enabled else 3)  # weights, AdamW's two moments, the average
    saves = total_steps // every - step // every + (total_steps % every > 0)
    branches_off = checkpoints.named is not None and not checkpoints.names_own()
    needed, export = checkpoints.room_needed(size, saves + branches_off), kind.export_bytes()
    needed += size * config.checkpoint.keep_best + export
    what = f"checkpoints of {size:,} bytes (checkpoint.keep={keep} and the next one) and an export of {export:,}"
    advice = "set an output_dir on a larger disk, or set a smaller checkpoint.keep"
    require_room(f"output_dir: {checkpoints.output_dir}", checkpoints.output_dir, needed, what, advice)
