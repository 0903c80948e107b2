"""What a person sees of a run: console, trackers, `metrics.jsonl`, and the model card."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from tqdm import tqdm

from finetune.config import Config, to_yaml
from finetune.pictures import save_png
from finetune.windows import Split, windows_per_epoch


class History:
    """`metrics.jsonl`: a line per logged update, appended as it happens, cut back to the checkpoint on resuming."""

    def __init__(self, file: Path, step: int):
        """Go on after `step`; -1 starts anew."""
        self.file = file
        kept = [line for line in self._read() if line["step"] <= step]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(partial, file)
        self._open = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - line-buffered for the run's life

    def add(self, step: int, values: dict[str, float]) -> None:
        self._open.write(json.dumps({"step": step, **values}) + "\n")

    def read(self) -> list[dict]:
        return self._read()

    def _read(self) -> list[dict]:
        if not self.file.exists():
            return []
        lines = []
        for text in self.file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the line that a kill cut short is of a step that will be done again
                break
        return lines


class Report:
    """Everything that is shown while a run goes on; silent on all processes but the main one."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, config_yaml: str, step: int, total_steps: int):
        """Go on after `step`; -1 starts anew."""
        self.accelerator, self.output_dir, self.shown = accelerator, output_dir, accelerator.is_main_process
        self.history = History(output_dir / "metrics.jsonl", step) if self.shown else None
        # A start opens an event file of its own; what earlier ones hold from this step on is purged, not doubled.
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        self.tensorboard = next((t.writer for t in accelerator.trackers if t.name == "tensorboard"), None)
        if self.tensorboard is not None and self.shown:
            self.tensorboard.add_text("config", f"```yaml\n{config_yaml}```", max(step, 0))
        self.bar = tqdm(
            total=total_steps,
            initial=max(step, 0),
            unit="step",
            disable=not self.shown,
            mininterval=0.1 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def say(self, *lines: str) -> None:
        """Lines on the main process's console, above the progress bar."""
        if self.shown:
            for line in lines:
                self.bar.write(line, file=sys.stdout)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step, to the trackers and the history."""
        self.accelerator.log(values, step=step)
        if self.shown:
            self.history.add(step, values)

    def advance(self, epoch: int, num_epochs: int, scalars: dict[str, float]) -> None:
        """One step done, on the progress bar."""
        self.bar.set_description(f"epoch {epoch + 1}/{num_epochs}", refresh=False)
        loss, speed = scalars.get("train/loss", math.nan), scalars["train/images_per_second"]
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} images/s", refresh=False)
        self.bar.update()

    def picture(self, name: str, step: int, picture: Image.Image, file: Path) -> None:
        """A picture, as a file and in TensorBoard."""
        if self.shown:
            save_png(picture, file)
            if self.tensorboard is not None:
                pixels = np.asarray(picture)
                self.tensorboard.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        self.bar.close()
        self.accelerator.end_training()


def table(title: str, rows: dict[str, str]) -> str:
    """Two columns for the console."""
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def plan(
    config: Config,
    accelerator: Accelerator,
    split: Split,
    unet: UNet2DModel,
    noise_scheduler: DDPMScheduler,
    num_images: int,
    num_held_out: int,
) -> str:
    """What is about to be trained, and how, before it starts."""
    batch, training = split.global_batch_size, config.training
    steps_per_epoch = windows_per_epoch(num_images, batch)
    total_steps = training.max_train_steps or steps_per_epoch * training.num_epochs
    channels, size = unet.config.in_channels, unet.config.sample_size
    last = num_images - (steps_per_epoch - 1) * batch
    precision = {"no": "float32"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} mixed precision")
    return table(
        "Plan",
        {
            "device": f"{accelerator.device.type}, {split.num_processes} process(es), {precision}",
            "model": f"{config.model.pretrained or 'from scratch'}: {unet.num_parameters() / 1e6:.2f} M parameters, "
            f"{noise_scheduler.config.prediction_type} prediction",
            "images": f"{num_images} to train on, {num_held_out} held out; {size} x {size}, {channels} channel(s)",
            "batch": f"{batch} = {split.micro_batch_size} per micro-batch x {split.gradient_accumulation_steps} "
            f"accumulation steps x {split.num_processes} process(es)",
            "length": f"{total_steps} updates, {steps_per_epoch} an epoch ({total_steps / steps_per_epoch:.4g} epochs; "
            f"an epoch's last update has {last} of {batch} images)",
            "learning rate": f"{config.optimizer.learning_rate:g}, {config.lr_scheduler.name}, "
            f"{config.lr_scheduler.warmup_steps} updates of warm-up",
            "output": config.output_dir,
        },
    )


def results(history: list[dict], total_steps: int, batch: int) -> dict[str, str]:
    """What the run came to, by name, for the console and the model card."""

    def curve(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in history if name in line]

    rows = {"updates": f"{total_steps} of {batch} images"}
    for title, name in {"last epoch": "train/epoch_loss", "smoothed": "train/loss_smoothed"}.items():
        if points := curve(name):
            rows[f"training loss, {title}"] = f"{points[-1][1]:.5f}"
    exported = curve("validation/loss_ema") or curve("validation/loss")
    if exported:
        step, best = min(exported, key=lambda point: point[1])
        rows["validation loss"] = f"{exported[-1][1]:.5f}, from {exported[0][1]:.5f}; best {best:.5f} at step {step}"
    return rows


def model_card(config: Config, rows: dict[str, str], picture: str | None) -> str:
    """The exported pipeline's README: what it was made from, how, what came out, how to use it."""
    base, source = config.model.pretrained, config.data.source
    is_hub_id = base is not None and not os.path.isdir(base)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "unconditional-image-generation"],
        base_model=base if is_hub_id else None,
    )
    origin = f"Fine-tuned from `{base}`" if base else "Trained from scratch"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(config.output_dir).name}",
        f"{origin} on the images of `{source}`. Holds the {'averaged (EMA)' if config.ema.enabled else 'last'} weights.",
        f"![samples]({picture})" if picture else "",
        "## Use",
        "```python\nfrom diffusers import DDIMPipeline\n\n"
        'pipeline = DDIMPipeline.from_pretrained("PATH_OR_REPOSITORY")\n'
        f"images = pipeline(batch_size=4, num_inference_steps={config.samples.inference_steps}).images\n```",
        "## Result",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        "## Recipe",
        f"```yaml\n{to_yaml(config)}```",
    ]
    return str(ModelCard("\n\n".join(part for part in parts if part) + "\n"))
