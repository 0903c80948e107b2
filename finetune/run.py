"""A run: what its parts share, and what happens between its updates."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from finetune import checkpoint, model, pictures
from finetune.capacity import LESS_PER_IMAGE, is_out_of_memory, smaller_splits, weight_bytes
from finetune.checkpoint import RunState
from finetune.config import Config, to_yaml
from finetune.data import loader_problem
from finetune.errors import UserError, first_line
from finetune.evaluation import StopCheck, Validation, sample
from finetune.files import whole
from finetune.folder import Lock, require_room
from finetune.launch import on_main_process, said_once, together
from finetune.metrics import Meters, Stopwatch, Window, WindowResult, loss_by_timestep
from finetune.randomness import timestep
from finetune.report import Report
from finetune.stopping import StopRequest
from finetune.summary import hyperparameters, model_card, results, table
from finetune.windows import WindowSampler, epoch_order, window_range, windows_per_epoch

SKIP_LIMIT = 25  # updates in a row that may be left out; fp16 needs a dozen or so to find its first loss scale


class Run:
    """The state of a training run, and the events of its life: resume, finish_step, evaluate, save, finish."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        unet: UNet2DModel,
        noise_scheduler: DDPMScheduler,
        ema: EMAModel | None,
        validation: Validation | None,
        sampler: WindowSampler,
        data_fingerprint: str,
    ):
        """Take hold of the output folder.

        Args:
            unet: the bare network, on its device; the prepared form of it goes through the loop.
            sampler: knows the images of an epoch and how a window of them is split.
            data_fingerprint: identity of the images' content, held-out ones included.

        Raises:
            UserError: if another run holds the folder, or it cannot be written.
        """
        self.config, self.accelerator, self.unet, self.noise_scheduler = config, accelerator, unet, noise_scheduler
        self.ema, self.validation, self.sampler = ema, validation, sampler
        self.output_dir, self.num_images = Path(config.output_dir), sampler.num_images
        self.batch = sampler.split.global_batch_size
        self.steps_per_epoch = windows_per_epoch(self.num_images, self.batch)
        self.total_steps = config.training.max_train_steps or self.steps_per_epoch * config.training.num_epochs
        self.identity = _identity(config, data_fingerprint, unet, noise_scheduler, self.batch)
        self.state, self.meters, self.clock, self.stop = RunState(), Meters(), Stopwatch(), StopRequest()
        self.saved_step = -1  # of the newest checkpoint
        self.check_stop = StopCheck(accelerator, self.stop.requested)
        self.lock = Lock(self.output_dir)
        on_main_process(self._take_folder)
        checkpoint.share_weights_between_setups(accelerator)

    def _take_folder(self) -> None:
        """Hold the output folder, where there is room for what the run will write."""
        weights = weight_bytes(self.unet)
        size = weights * (3 if self.ema is None else 4)  # weights, AdamW's two moments, the average
        keep, saves = self.config.checkpoint.keep, -(-self.total_steps // self.config.checkpoint.every_steps)
        needed = checkpoint.room_needed(self.output_dir, size, keep, saves) + weights
        what = f"checkpoints of {size:,} bytes (checkpoint.keep={keep} and the next one) and the pipeline"
        require_room(self.output_dir, needed, what)
        self.lock.acquire()
        checkpoint.remove_rests(self.output_dir)

    @property
    def done(self) -> bool:
        return self.state.step >= self.total_steps

    @property
    def place(self) -> tuple[int, int]:
        """The epoch, and the window in it, that come next."""
        return divmod(self.state.step, self.steps_per_epoch)

    @property
    def positions(self) -> range:
        """The next window's places in its epoch's order."""
        return window_range(self.place[1], self.num_images, self.batch)

    def resume(self) -> None:
        """Go back to the newest whole checkpoint, if there is one, and open the report from there on."""
        accelerator = self.accelerator
        folder = on_main_process(
            lambda: checkpoint.find(self.output_dir, self.config.checkpoint.resume, accelerator.print)
        )
        if folder is not None:
            together(lambda: self._restore(folder))
        together(self._open_report)
        self.stop.install()

    def _open_report(self) -> None:
        resolved = to_yaml(self.config)
        if self.accelerator.is_main_process:
            with whole(self.output_dir / "config.yaml") as partial:
                partial.write_text(resolved, encoding="utf-8")
        self.report = Report(self.accelerator, self.output_dir, resolved, self.saved_step, self.total_steps)

    def _restore(self, folder: Path) -> None:
        with checkpoint.refusing(folder):
            saved = self._load(folder)
        self.accelerator.print(f"Going on from {folder}: step {self.state.step} of {self.total_steps}.")
        for phrase in checkpoint.differences(saved["config"], self.config.model_dump(mode="json")):
            self.accelerator.print(f"  {phrase}")

    def _load(self, folder: Path) -> dict:
        """Put back all that a checkpoint holds; returns its run state."""
        saved = checkpoint.read_run_state(folder)
        if changed := checkpoint.differences(saved["identity"], self.identity):
            raise UserError(
                *(f"{folder} is of another run: {phrase}" for phrase in changed),
                "give another output_dir to start a new run, or the values of before to go on with this one",
            )
        checkpoint.load(self.accelerator, folder)
        self.state, self.meters = RunState(**saved["state"]), Meters.from_state(saved["meters"])
        self.saved_step = self.state.step
        if self.ema is not None:
            averaged = checkpoint.load_tensors(folder, "ema")
            self.ema.shadow_params = [averaged[name].to(weight.device) for name, weight in self.unet.named_parameters()]
            self.ema.optimization_step = self.state.updates
        return saved

    def recover(self, error: RuntimeError | OSError | MemoryError, window: Window) -> None:
        """Have the window done again in smaller micro-batches, if it was memory that ran out and nothing was updated.

        Raises:
            UserError: if the micro-batch was given, or there are processes that wait for this one's gradients, or a
                data worker died.
            Exception: the error itself, if it is about something else or the update had begun.
        """
        if problem := loader_problem(error):
            raise problem from error
        if not is_out_of_memory(error) or window.closed:
            raise error
        smaller, old = smaller_splits(self.sampler.split)[1:], self.sampler.split.micro_batch_size
        if self.config.training.micro_batch_size != "auto" or self.accelerator.num_processes > 1 or not smaller:
            advice = f"use {LESS_PER_IMAGE}"
            if old > 1:
                advice = "set a smaller one (the global batch can stay as it is)"
            raise UserError(
                f"training.micro_batch_size: out of memory with {old} at step {self.state.step + 1}; {advice}, and "
                f"the same command goes on from the last checkpoint ({first_line(error)})",
                exit_code=1,
            ) from error
        self.sampler.split = smaller[0]
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = smaller[0].gradient_accumulation_steps, 0
        self.unet.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        self.report.say(f"Out of memory with micro-batches of {old}: on with {smaller[0].micro_batch_size}.")

    def refuse(self, result: WindowResult) -> None:
        """A loss or gradient that is not finite, before it touches the weights: end the run, or leave the window out.

        Under fp16 an overflowing gradient is the loss scaler's business: it lowers its scale and skips the update.
        """
        overflow = self.accelerator.scaler is not None and np.isfinite(result.losses).all()
        tolerated = overflow or self.config.training.nonfinite_loss == "skip"
        if tolerated and self.state.skipped_in_a_row < SKIP_LIMIT:
            return
        (epoch, _), positions = self.place, np.array(self.positions)
        bad = positions[~np.isfinite(result.losses)] if not np.isfinite(result.losses).all() else positions
        images = epoch_order(self.config.seed, epoch, self.num_images)[bad].tolist()
        again = f", {self.state.skipped_in_a_row + 1} updates in a row" if tolerated else ""
        problem = (
            f"step {self.state.step + 1}: found loss {result.losses.mean()}, gradient norm {result.grad_norm}{again}, "
            f"expected finite ones; images {images} at timesteps {self._timesteps(epoch, bad).tolist()}. Nothing was "
            "updated and the last checkpoint is whole: lower optimizer.learning_rate, look at these images, or set "
            "training.nonfinite_loss=skip"
        )
        raise said_once(UserError(problem, exit_code=1))

    def _timesteps(self, epoch: int, positions: np.ndarray | range) -> np.ndarray:
        steps, sampling = self.noise_scheduler.config.num_train_timesteps, self.config.training.timestep_sampling
        return np.array([timestep(self.config.seed, epoch, int(place), steps, sampling) for place in positions])

    def finish_step(self, result: WindowResult, learning_rate: float, applied: bool) -> None:
        """Count a window that is done, applied or skipped, and log what it came to."""
        (epoch, _), positions = self.place, self.positions
        self.state.step += 1
        self.state.skipped += not applied
        self.state.skipped_in_a_row = 0 if applied else self.state.skipped_in_a_row + 1
        self.clock.tick("update")
        phases = self.clock.lap()
        seconds = sum(phases.values())
        self.state.seconds += seconds
        scalars = {"train/learning_rate": learning_rate, "train/images_per_second": len(positions) / seconds}
        scalars |= {f"time/{phase}": spent for phase, spent in phases.items()}
        if np.isfinite(result.losses).all():
            timesteps = self._timesteps(epoch, positions)
            steps = self.noise_scheduler.config.num_train_timesteps
            scalars |= self.meters.add_window(result, timesteps, steps, self.sampler.split)
        if self.state.skipped:
            scalars["train/skipped_updates"] = self.state.skipped
        ended = self.state.step % self.steps_per_epoch == 0 or self.done
        if ended and self.meters.epoch.images:  # none if all its updates were left out
            scalars["train/epoch_loss"] = self.meters.epoch.close()
            self.report.say(f"epoch {epoch + 1}: average loss {scalars['train/epoch_loss']:.5f}")
        if self.state.step % self.config.logging.every_steps == 0 or "train/epoch_loss" in scalars:
            self.report.log(self.state.step, scalars)
        self.report.advance(epoch, -(-self.total_steps // self.steps_per_epoch), scalars)
        self.clock.tick("logging")

    def _due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0 or self.done

    def evaluate(self) -> None:
        """Validation and samples, where this step calls for them and they were not yet made.

        Raises:
            Interrupted: on all processes, after any of them was told to stop. Resuming makes up for what is left out.
        """
        config, state = self.config, self.state
        if self.validation and self._due(config.validation.every_steps) and state.validated != state.step:
            self._validate()
        if config.samples.count and self._due(config.samples.every_steps) and state.sampled != state.step:
            self._sample()
        self.clock.skip()

    def _validate(self) -> None:
        losses = self.validation.losses(self.unet, self.accelerator, self.check_stop)
        scalars = {"validation/loss": losses.mean()}
        if self.ema is not None:
            with model.averaged_weights(self.unet, self.ema):
                averaged = self.validation.losses(self.unet, self.accelerator, self.check_stop)
            scalars["validation/loss_ema"] = averaged.mean()
        steps = self.noise_scheduler.config.num_train_timesteps
        for name, loss in loss_by_timestep(losses, self.validation.timesteps, steps).items():
            scalars[f"validation/loss_by_timestep/{name}"] = loss
        self.report.log(self.state.step, {name: float(value) for name, value in scalars.items()})
        self.state.validated = self.state.step

    def _sample(self) -> None:
        options = self.config.samples
        with model.averaged_weights(self.unet, self.ema):
            images = sample(
                self.unet, self.noise_scheduler, self.accelerator, self.check_stop,
                self.config.seed, options.count, options.inference_steps,
            )  # fmt: skip
            strip = self.validation and self.validation.denoise(self.unet, self.accelerator.device)
        self.report.picture("samples", self.state.step, pictures.tiled(images), self.samples_file)
        if strip is not None:
            file = self.samples_file.with_name(f"denoising-{self.state.step}.png")
            self.report.picture("denoising", self.state.step, pictures.tiled(strip, len(strip) // 2), file)
        self.state.sampled = self.state.step

    @property
    def samples_file(self) -> Path:
        return self.output_dir / "samples" / f"step-{self.state.step}.png"

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved_step == self.state.step:
            return
        epoch, window = self.place
        run_state = {
            "epoch": epoch,
            "window": window,
            "state": asdict(self.state),
            "meters": asdict(self.meters),
            "identity": self.identity,
            "config": self.config.model_dump(mode="json"),
        }
        tensors = {}
        if self.ema is not None:
            names = (name for name, _ in self.unet.named_parameters())
            tensors["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
        checkpoint.save(
            self.accelerator, self.output_dir, self.state.step, run_state, tensors, self.config.checkpoint.keep
        )
        self.saved_step = self.state.step
        self.clock.skip()

    def interrupt(self) -> None:
        """End here, to go on later: a checkpoint, and one line that says so."""
        self.save()
        where = f"step {self.state.step} of {self.total_steps}"
        self.report.say(f"Stopped after {where}; all is saved, and the same command goes on from there.")
        self.report.close()

    def finish(self, flops: int) -> None:
        """The last checkpoint, the curve, the pipeline, and what the run came to; `flops` are those of one image."""
        self.save()
        if self.accelerator.is_main_process:
            history, folder = self.report.history.read(), self.output_dir / "pipeline"
            epochs, windows = divmod(self.total_steps, self.steps_per_epoch)
            images = epochs * self.num_images + windows * self.batch
            rows = results(history, self.state.updates, images, self.state.seconds, flops)
            pictures.loss_curve(history, self.output_dir / "loss_curve.png")
            shown = [self.samples_file] if self.samples_file.exists() else []
            card = model_card(self.config, rows, shown[0].name if shown else None)
            with model.averaged_weights(self.unet, self.ema):
                model.save_pipeline(self.unet, self.noise_scheduler, folder, card, shown)
            if self.config.export.push_to_hub is not None:
                rows["uploaded to"] = model.push(folder, self.config.export.push_to_hub)
            self.report.hyperparameters(*hyperparameters(self.config, self.batch, self.state.updates, history))
            rows |= {name: str(self.output_dir / name) for name in ("pipeline", "samples", "loss_curve.png")}
            rows |= {"curves": f"tensorboard --logdir {self.output_dir}"}
            rows |= {"to go on": f"the same command with a training.max_train_steps above {self.total_steps}"}
            self.report.say(table(f"Finished: {self.output_dir}", rows))
            if advice := self.meters.noise_scale.advice(self.sampler.split):
                self.report.say(f"Gradient noise scale: {advice}.")
        self.accelerator.wait_for_everyone()
        self.report.close()


def _identity(
    config: Config, data_fingerprint: str, unet: UNet2DModel, noise_scheduler: DDPMScheduler, global_batch_size: int
) -> dict:
    """What makes a run this run and no other, as it comes back from JSON."""

    def own(component: UNet2DModel | DDPMScheduler) -> dict:
        return {key: value for key, value in component.config.items() if not key.startswith("_")}

    options = {"data": {"crop", "random_flip"}, "training": {"timestep_sampling", "snr_gamma"}, "model": {"pretrained"}}
    options["ema"] = {"enabled"}
    identity = config.model_dump(mode="json", include={"seed": True, **options})
    identity["training"]["global_batch_size"] = global_batch_size
    identity["data"]["fingerprint"] = data_fingerprint
    identity |= {"unet": own(unet), "noise_scheduler": own(noise_scheduler)}
    return json.loads(json.dumps(identity))
