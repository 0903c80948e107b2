"""A training run: its state, and what happens after each of its updates and at its end."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from finetune.config.schema import Config
from finetune.core.distributed import together
from finetune.core.kind import Kind
from finetune.core.sharding import gathered, is_sharded
from finetune.core.stopping import StopRequest, prevent_restart
from finetune.data.batches import Batches
from finetune.data.order import WindowSampler
from finetune.models import hub
from finetune.models.ema import averaged_weights
from finetune.run import checkpoint, shards
from finetune.run.batch_advice import batch_advice
from finetune.run.checkpoints import Checkpoints
from finetune.run.evaluator import Evaluator
from finetune.run.folder import Lock
from finetune.run.loss_curve import loss_curve
from finetune.run.report import Report
from finetune.run.state import Length, RunState
from finetune.run.summary import model_card, outputs, results
from finetune.run.table import table
from finetune.training.metrics import Meters, Stopwatch
from finetune.training.window import Window, WindowResult


@dataclass
class Run:
    """A run between its start (`start_run`) and its end: what the loop asks and tells."""

    config: Config
    accelerator: Accelerator
    kind: Kind
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None
    evaluator: Evaluator
    examples: Batches  # of the training images; knows what was drawn for each
    sampler: WindowSampler
    length: Length
    identity: dict[str, Any]
    state: RunState
    meters: Meters
    report: Report
    lock: Lock | None  # on the main process; held as long as the run exists
    checkpoints: Checkpoints
    saved_step: int  # of the newest checkpoint, -1 if there is none
    stop: StopRequest
    clock: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.config.output_dir)
        self.window = self._next_window()

    def _next_window(self) -> Window:
        full = len(self.positions) == self.sampler.layout.global_batch_size
        return Window(self.sampler.dealing(*self.place), full)

    @property
    def done(self) -> bool:
        return self.state.step >= self.length.total_steps

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, and the window in it, that come next."""
        return self.length.place(self.state.step)

    @property
    def positions(self) -> range:
        """The next window's positions in its epoch's order."""
        return self.length.positions(self.state.step)

    def batches(self, loader: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """This process's micro-batches, epoch after epoch, from where the run is until it is done."""
        while not self.done:
            self.sampler.seek(*self.place)
            for batch in loader:
                self.clock.tick("data")
                yield batch
                self.clock.tick("compute")
                if self.done:
                    return

    def close_window(self, grad_norm: torch.Tensor) -> WindowResult:
        """Gather the losses of the window from all processes; the update comes next."""
        self.clock.tick("compute")
        return self.window.close(self.accelerator, grad_norm, self.stop.requested())

    def finish_step(self, result: WindowResult, learning_rate: float, applied: bool) -> None:
        """Advance the step and log it.

        Args:
            applied: whether the weights were updated, or the update skipped.
        """
        (epoch, _), positions = self.place, self.positions
        self.state.step += 1
        self.window = self._next_window()
        self.state.skipped += not applied
        self.state.skipped_in_a_row = 0 if applied else self.state.skipped_in_a_row + 1
        self.clock.tick("update")
        phases = self.clock.lap()
        seconds = sum(phases.values())
        self.state.seconds += seconds
        passed = epoch + positions.stop / self.length.num_images
        scalars = {"train/epoch": passed, "train/learning_rate": learning_rate}
        scalars["train/images_per_second"] = len(positions) / seconds
        scalars |= {f"time/{phase}": spent for phase, spent in phases.items()}
        if np.isfinite(result.losses).all():
            examples, timesteps = self.examples, self.examples.timesteps(epoch, positions)
            dropped = examples.dropped(epoch, positions) if examples.conditional else None
            scalars |= self.meters.add_window(result, timesteps, examples.num_train_timesteps, dropped)
        if self.state.skipped:
            scalars["train/skipped_updates"] = self.state.skipped
        ended = self.state.step % self.length.steps_per_epoch == 0 or self.done
        if ended and self.meters.epoch.images:  # none if all its updates were skipped
            scalars["train/epoch_loss"] = self.meters.epoch.close()
            self.report.say(f"epoch {epoch + 1}: average loss {scalars['train/epoch_loss']:.5f}")
        if self.state.step % self.config.logging.every_steps == 0 or "train/epoch_loss" in scalars:
            self.report.log(self.state.step, scalars)
        self.report.advance(epoch, self.length.num_epochs, scalars)
        self.clock.tick("logging")

    def evaluate(self) -> None:
        """Validation, samples and quality, where they are due at this step and not done yet.

        Raises:
            Interrupted: on all processes, after any of them was told to stop. Resuming runs the missing evaluation.
        """
        self.evaluator.evaluate(self.state, self.length)
        self.clock.skip()

    def save_if_due(self) -> None:
        """A checkpoint, every `checkpoint.every_steps`, and of the best step where that one is kept."""
        options, step = self.config.checkpoint, self.state.step
        if step % options.every_steps == 0 or (options.keep_best and self.state.best_step == step):
            self.save()

    def save(self) -> None:
        """A checkpoint of this step, unless there is one; older ones are pruned, also those a kill left to prune."""
        if self.saved_step != self.state.step:
            self._save()
        if self.accelerator.is_main_process:
            best_step = self.state.best_step if self.config.checkpoint.keep_best else -1
            self.checkpoints.prune(self.state.step, best_step)

    def _save(self) -> None:
        epoch, window = self.place
        run_state = {
            "epoch": epoch,
            "window": window,
            "state": asdict(self.state),
            "meters": asdict(self.meters),
            "identity": self.identity,
            "config": self.config.model_dump(mode="json"),
        }
        tensors, parts, weights = {}, None, self.kind.trainable()
        if is_sharded(self.kind.network):
            parts = shards.state_of(weights, self.optimizer, self.ema)
        elif self.ema is not None:
            tensors["ema"] = dict(zip(weights, self.ema.shadow_params, strict=True))
        checkpoint.save(self.accelerator, self.output_dir, self.state.step, run_state, tensors, parts)
        self.saved_step = self.state.step
        self.clock.skip()

    def interrupt(self) -> int:
        """Save and exit; resumable. Returns the exit code."""
        self.save()
        where = f"step {self.state.step} of {self.length.total_steps}"
        self.report.say(f"Stopped after {where}; everything is saved. Run the same command again to resume.")
        self.report.close()
        prevent_restart()
        return self.stop.exit_code

    def finish(self, flops: int) -> int:
        """The last checkpoint, the loss curve, the export, and the results. Returns the exit code.

        Args:
            flops: of one image, forward and backward.

        Raises:
            UserError: on all processes, if the main one could not write the export or upload it.
        """
        self.save()
        main, spread = self.accelerator.is_main_process, is_sharded(self.kind.network)
        if spread:
            self.optimizer.state.clear()  # is saved, and needed no more: makes room for the whole network

        def export() -> None:
            if main or spread:
                with averaged_weights(self.kind.trainable().values(), self.ema), gathered(self.kind, on_this=main):
                    if main:
                        self._export(flops)

        together(export)
        self.report.close()
        return 0

    def _export(self, flops: int) -> None:
        history = self.report.history.read() if self.report.history else []
        folder, state = self.output_dir / self.kind.export_name, self.state
        rows = results(history, state.updates, self.length.images_until(state.step), state.seconds, flops)
        loss_curve(history, self.output_dir / "loss_curve.png", self.length.steps_per_epoch)
        samples = self.evaluator.samples_file(state.step)
        shown = [samples] if samples.exists() else []
        prompt = self.evaluator.evaluations.samples.example
        card = model_card(self.config, self.kind, rows, shown[0].name if shown else None, prompt)
        hub.save_export(self.kind.save, folder, card, shown)
        if self.config.export.push_to_hub is not None:
            rows["uploaded to"] = hub.push(folder, self.config.export.push_to_hub)
        rows |= outputs(self.output_dir, self.kind.export_name, self.length.total_steps)
        self.report.say(table(f"Finished: {self.output_dir}", rows))
        if advice := batch_advice(self.meters.noise_scale, self.config, self.sampler.layout, self.length.num_images):
            self.report.say(advice)
