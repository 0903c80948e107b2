"""The start of a run: where it starts is found first, without writing anything; then its folder is taken."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from finetune.config.load import to_yaml
from finetune.config.schema import Config
from finetune.core.batch import BatchLayout
from finetune.core.distributed import on_main_process, say, together
from finetune.core.errors import UserError
from finetune.core.files import atomic, require_room
from finetune.core.hosts import require_same
from finetune.core.kind import Kind
from finetune.core.sharding import is_sharded
from finetune.core.stopping import StopCheck, StopRequest
from finetune.data.order import WindowSampler
from finetune.evaluation.evaluations import Evaluations
from finetune.run import checkpoint, shards
from finetune.run.checkpoints import Checkpoints
from finetune.run.evaluator import Evaluator
from finetune.run.folder import Lock, check_folder, require_shared
from finetune.run.report import Report
from finetune.run.run import Run
from finetune.run.state import Length, RunState, differences, identity
from finetune.run.summary import hyperparameters
from finetune.training.metrics import Meters


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
    accelerator: Accelerator,
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
        _check_room(config, kind, checkpoints, step, length.total_steps)
        check_folder(checkpoints.output_dir)
        return folder, existing

    folder, existing = on_main_process(find)
    return Start(folder, length, own_identity, checkpoints, existing)


def _other_files(expected: dict[str, Any], found: dict[str, Any], there: str, here: str) -> str | None:
    """Why a host's files make another run of the same config, if they do."""
    changed = [phrase.partition(":")[0] for phrase in differences(expected, found)]
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
                *(f"{folder} is of another run: {phrase}{_meaning(phrase)}" for phrase in changed),
                "set another output_dir to start a new run, or the former values to resume this one",
            )
        step = RunState(**saved["state"]).step
    if step > length.total_steps:
        raise UserError(
            f"training: found a length of {length.total_steps} updates, but {folder} is past it, at step {step}; set "
            f"max_train_steps to {step} or more, or branch off from an earlier checkpoint (checkpoint.resume) into "
            "another output_dir"
        )
    return step


def _meaning(change: str) -> str:
    """Of a changed hash what it is of."""
    if not change.startswith("data.fingerprint:"):
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
    needed = checkpoints.room_needed(size, saves + branches_off) + size * config.checkpoint.keep_best + weights
    what = f"checkpoints of {size:,} bytes (checkpoint.keep={keep} and the next one) and the pipeline"
    advice = "set an output_dir on a larger disk, or set a smaller checkpoint.keep"
    require_room(f"output_dir: {checkpoints.output_dir}", checkpoints.output_dir, needed, what, advice)


def start_run(
    start: Start,
    config: Config,
    accelerator: Accelerator,
    kind: Kind,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    evaluations: Evaluations,
    sampler: WindowSampler,
) -> Run:
    """Lock the output folder, load the checkpoint that was found, and open the report. Called by all processes.

    Args:
        kind: with its network on the device; network and optimizer are prepared by the Accelerator.

    Raises:
        UserError: if another run holds the folder, or it cannot be written, or the checkpoint cannot be loaded.
    """
    lock = together(lambda: _take_folder(start) if accelerator.is_main_process else None)
    require_shared(start.checkpoints.output_dir)
    checkpoint.share_weights_between_setups(accelerator)
    state, meters, folder = RunState(), Meters(), start.checkpoint
    if folder is not None:
        state, meters, changes = together(lambda: _restore(folder, config, accelerator, kind, optimizer, ema))
        named = start.checkpoints.named
        since = f", which was trained on from {named}" if named not in (None, folder) else ""
        say(f"Resuming from {folder}{since}: step {state.step} of {start.length.total_steps}.")
        for change in changes:
            say(f"  {change}")
        if folder == named:
            state.branches.append(checkpoint.digest(folder))
    branch_point = folder if folder == start.checkpoints.named and not start.checkpoints.names_own() else None
    if branch_point is not None:
        together(lambda: _copy_metrics(branch_point, config) if accelerator.is_main_process else None)
    step = -1 if folder is None else state.step
    report = together(lambda: _open_report(config, accelerator, step, start.length, branch_point is not None))
    stop = StopRequest()
    check_stop = StopCheck(stop.requested)
    run = Run(
        config=config,
        accelerator=accelerator,
        kind=kind,
        optimizer=optimizer,
        ema=ema,
        evaluator=Evaluator(config, accelerator, kind, ema, evaluations, check_stop, report),
        sampler=sampler,
        length=start.length,
        identity=start.identity,
        state=state,
        meters=meters,
        report=report,
        lock=lock,
        checkpoints=start.checkpoints,
        saved_step=step if branch_point is None else -1,
        stop=stop,
    )
    if branch_point is not None:
        run.save()  # from here on the branch does not need the folder that it came from
    return run


def _take_folder(start: Start) -> Lock:
    lock = Lock(start.checkpoints.output_dir)
    if list(start.checkpoints.by_step().values()) != start.found:
        raise UserError(
            f"output_dir: {start.checkpoints.output_dir}: another run wrote here a moment ago; run the same command "
            "again to resume from its newest checkpoint"
        )
    start.checkpoints.remove_leftovers()
    return lock


def _restore(
    folder: Path,
    config: Config,
    accelerator: Accelerator,
    kind: Kind,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
) -> tuple[RunState, Meters, list[str]]:
    """Load a checkpoint into network, optimizer and average.

    Returns:
        Where the run was, its statistics, and the settings that have changed since.
    """
    with checkpoint.untrusted(folder) as files:
        saved = checkpoint.read_run_state(files)
        state, meters = RunState(**saved["state"]), Meters.from_state(saved["meters"])
        if is_sharded(kind.network) or shards.written(files):
            shards.load(files, kind.trainable(), optimizer, ema)
            accelerator.step = 0
        else:
            checkpoint.load(accelerator, files)
            if ema is not None:
                averaged = checkpoint.load_tensors(files, "ema")
                ema.shadow_params = [averaged[name].to(weight.device) for name, weight in kind.trainable().items()]
        if ema is not None:
            ema.optimization_step = state.updates
        return state, meters, differences(saved["config"], config.model_dump(mode="json"))


def _copy_metrics(folder: Path, config: Config) -> None:
    """Give a branch the metrics of the run that it came from; the report cuts them back to the branch point."""
    metrics = folder.parent / "metrics.jsonl"
    if metrics.exists():
        with atomic(Path(config.output_dir) / metrics.name) as partial:
            shutil.copyfile(metrics, partial)


def _open_report(config: Config, accelerator: Accelerator, saved_step: int, length: Length, branch: bool) -> Report:
    resolved, output_dir = to_yaml(config), Path(config.output_dir)
    if accelerator.is_main_process:
        with atomic(output_dir / "config.yaml") as partial:
            partial.write_text(resolved, encoding="utf-8")
    settings = hyperparameters(config, length.global_batch_size, length.total_steps)
    return Report(accelerator, output_dir, resolved, settings, saved_step, length.total_steps, branch)
