"""What is evaluated between updates, and when: validation, samples, and the quality of samples."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from finetune.config.schema import Config
from finetune.core.kind import Kind
from finetune.core.stopping import StopCheck
from finetune.evaluation import pictures
from finetune.evaluation.evaluations import Evaluations
from finetune.evaluation.quality import Quality
from finetune.evaluation.sampling import ImageSampler
from finetune.evaluation.validation import Validation
from finetune.models.ema import averaged_weights
from finetune.run.report import Report
from finetune.run.state import Length, RunState
from finetune.training.metrics import loss_by_timestep


@dataclass
class Evaluator:
    """Evaluates a run at the steps where its config says so; samples are drawn with the averaged weights."""

    config: Config
    accelerator: Accelerator
    kind: Kind
    ema: EMAModel | None
    evaluations: Evaluations
    check_stop: StopCheck
    report: Report

    def evaluate(self, state: RunState, length: Length) -> None:
        """Do what is due at this step and not done yet, and note in `state` that it is done. Called by all processes.

        Raises:
            Interrupted: on all processes, after any of them was told to stop.
        """
        validation, samples = self.config.validation, self.config.samples

        def due(every_steps: int, last: int) -> bool:
            return (state.step % every_steps == 0 or state.step >= length.total_steps) and last != state.step

        if self.evaluations.validation and due(length.interval(validation.every_steps), state.validated):
            self._validate(self.evaluations.validation, state)
            state.validated = state.step
        if samples.count and due(samples.every_steps, state.sampled):
            self._draw(state.step)
            state.sampled = state.step
        quality = self.evaluations.quality
        if quality and validation.quality and due(validation.quality.every_steps, state.measured):
            distance = self._measure(quality, state.step)
            if state.step > 0 and (state.best_distance is None or distance < state.best_distance):
                state.best_step, state.best_distance = state.step, distance
            state.measured = state.step

    def samples_file(self, step: int) -> Path:
        """The sample grid of a step."""
        return Path(self.config.output_dir) / "samples" / f"step-{step}.png"

    def _averaged(self) -> AbstractContextManager[None]:
        return averaged_weights(self.kind.trainable().values(), self.ema)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """With the averaged weights; what decodes latents is loaded once for the block, and freed at its end."""
        with self._averaged():
            try:
                yield
            finally:
                if (encoders := self.kind.encoders()) is not None:
                    encoders.free()

    def _validate(self, validation: Validation, state: RunState) -> None:
        losses = validation.losses(self.accelerator, self.check_stop)
        scalars = {"validation/loss": losses.mean()}
        if state.step == 0 and self.config.model.pretrained is not None:
            state.base_loss = float(losses.mean())
        if state.base_loss is not None:  # a level line, which shows how far the loss has come
            scalars["validation/loss_base"] = np.float64(state.base_loss)
        if self.kind.conditional:  # the difference is what the condition tells the network
            without = validation.losses(self.accelerator, self.check_stop, dropped=True).mean()
            scalars |= {"validation/loss_unconditional": without, "validation/condition_gain": without - losses.mean()}
        if self.ema is not None:
            with self._averaged():
                scalars["validation/loss_ema"] = validation.losses(self.accelerator, self.check_stop).mean()
        steps = self.kind.noise_scheduler.config.num_train_timesteps
        for name, loss in loss_by_timestep(losses, validation.timesteps, steps).items():
            scalars[f"validation/loss_by_timestep/{name}"] = np.float64(loss)
        self.report.log(state.step, {name: float(value) for name, value in scalars.items()})

    def _draw(self, step: int) -> None:
        options, rows = self.config.samples, self.evaluations.samples.names
        validation = self.evaluations.validation
        names = [name for name in rows for _ in range(-(-options.count // len(rows)))]
        sampler = self._sampler
        with self._drawing():
            blocks = [
                [np.stack(sampler.sample(names, [shape] * len(names), scale)) for scale in options.guidance_scales]
                for shape in self.evaluations.samples.shapes
            ]
            strip = validation.denoise(self.accelerator.device) if validation else None
        grid = pictures.beside([pictures.sample_grid(block, rows, options.guidance_scales) for block in blocks])
        file = self.samples_file(step)
        self.report.picture("samples", step, grid, file)
        if validation and strip is not None:
            levels = validation.noise_levels
            labelled = pictures.grid(strip, len(levels), ["input", "output"], levels, corner="timestep")
            self.report.picture("denoising", step, labelled, file.with_name(f"denoising-{step}.png"))

    def _measure(self, quality: Quality, step: int) -> float:
        """Compare samples with held-out images, drawn for their conditions and shapes; returns the kernel distance."""
        with self._drawing():
            scale = self.config.samples.guidance_scales[0]
            samples = self._sampler.sample(quality.names, quality.shapes, scale, "quality")
            distances = quality.distances(samples, self.accelerator, self.check_stop)
        self.report.log(step, {f"validation/{name}": value for name, value in distances.items()})
        return distances["kernel_distance"]

    @property
    def _sampler(self) -> ImageSampler:
        steps, negative = self.config.samples.inference_steps, self.evaluations.samples.negative_prompt
        drawn = self.config.seed, steps, negative, self.evaluations.embed
        return ImageSampler(self.kind, self.accelerator, self.check_stop, *drawn)
