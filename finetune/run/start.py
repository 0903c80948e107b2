"""The start of a run, where that was found: its folder is taken, its checkpoint loaded, its report opened."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from finetune.config.load import to_yaml
from finetune.config.schema import Config
from finetune.core.distributed import say, together
from finetune.core.errors import UserError
from finetune.core.files import atomic
from finetune.core.kind import Kind
from finetune.core.sharding import is_sharded
from finetune.core.stopping import StopCheck, StopRequest
from finetune.data.batches import Batches
from finetune.data.order import WindowSampler
from finetune.evaluation.evaluations import Evaluations
from finetune.run import checkpoint, shards
from finetune.run.evaluator import Evaluator
from finetune.run.folder import Lock, require_shared
from finetune.run.report import Report
from finetune.run.run import Run
from finetune.run.starting_point import Start
from finetune.run.state import Change, Length, RunState, differences, from_json
from finetune.run.summary import hyperparameters
from finetune.training.metrics import Meters


def start_run(
    start: Start,
    config: Config,
    accelerator: Accelerator,
    kind: Kind,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    evaluations: Evaluations,
    examples: Batches,
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
        examples=examples,
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
) -> tuple[RunState, Meters, list[Change]]:
    """Load a checkpoint into network, optimizer and average.

    Returns:
        Where the run was, its statistics, and the settings that have changed since.
    """
    with checkpoint.untrusted(folder) as files:
        saved = checkpoint.read_run_state(files)
        state, meters = from_json(RunState, saved["state"]), from_json(Meters, saved["meters"])
        if is_sharded(kind.network) or shards.written(files):
            shards.load(files, kind.trainable(), optimizer, ema)
            accelerator.step = 0
        else:
            checkpoint.load(accelerator, files)
            shards.check_moments(optimizer)
            if ema is not None:
                shards.load_whole(files / "ema.safetensors", kind.trainable(), ema.shadow_params)
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
