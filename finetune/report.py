"""What a person watches while a run goes on: console, trackers, and `metrics.jsonl`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from finetune.files import whole, writing
from finetune.pictures import save_png

LAYOUT = {  # TensorBoard's custom scalars: what belongs together in one chart
    "Loss": {
        "training and validation": ["Multiline", ["train/loss_smoothed", "validation/loss$", "validation/loss_ema"]],
        "training by timestep": ["Multiline", ["train/loss_by_timestep/.*"]],
        "validation by timestep": ["Multiline", ["validation/loss_by_timestep/.*"]],
    },
    "Batch": {"gradient noise scale": ["Multiline", ["train/gradient_noise_scale"]]},
}


class History:
    """`metrics.jsonl`: a line per logged update, appended as it happens, cut back to the checkpoint on resuming."""

    def __init__(self, file: Path, step: int):
        """Go on after `step`; -1 starts anew."""
        self.file = file
        kept = [line for line in self.read() if line["step"] <= step]
        with whole(file) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        with writing(file):
            self._open = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - line-buffered for the run's life

    def add(self, step: int, values: dict[str, float]) -> None:
        with writing(self.file):
            self._open.write(json.dumps({"step": step, **values}) + "\n")

    def read(self) -> list[dict]:
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
        self.accelerator, self.shown = accelerator, accelerator.is_main_process
        self.history = History(output_dir / "metrics.jsonl", step) if self.shown else None
        # A start opens an event file of its own; what earlier ones hold from this step on is purged, not doubled.
        name = "tensorboard" if "tensorboard" in map(str, accelerator.log_with) else output_dir.name
        self.curves = output_dir / name
        with writing(self.curves):
            accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": step + 1}})
        boards = [tracker.writer for tracker in accelerator.trackers if tracker.name == "tensorboard" and self.shown]
        self.board = boards[0] if boards else None
        if self.board is not None and step < 0:
            self.board.add_custom_scalars(LAYOUT)
            self.board.add_text("config", f"```yaml\n{config_yaml}```", 0)
        self.bar = tqdm(
            total=total_steps,
            initial=max(step, 0),
            unit="step",
            disable=not self.shown,
            mininterval=0.1 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )

    def say(self, text: str) -> None:
        """On the main process's console, above the progress bar."""
        if self.shown:
            self.bar.write(text, file=sys.stdout)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step, to the trackers and the history; JSON has no name for what is not finite."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with writing(self.curves):
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
            if self.board is not None:
                pixels = np.asarray(picture)
                with writing(self.curves):
                    self.board.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def hyperparameters(self, values: dict[str, bool | int | float | str], metrics: dict[str, float]) -> None:
        """For TensorBoard's HPARAMS tab: a run's settings beside the last values of curves that it logged.

        Written into the run itself; `add_hparams` would make a run of its own of it.
        """
        if self.board is not None:
            for summary in hparams(values, metrics):
                self.board.file_writer.add_summary(summary)

    def close(self) -> None:
        """The last line of every file is on disk afterwards. Called by all processes."""
        self.bar.close()
        with writing(self.curves):
            for tracker in self.accelerator.trackers:  # `end_training` would part from the other processes too soon
                tracker.finish()
