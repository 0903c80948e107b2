"""Progress of a run: console, trackers, and `metrics.jsonl`."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from finetune.core.files import atomic, writing
from finetune.evaluation.pictures import save_png
from finetune.run.board import Board

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal for a bar


class History:
    """`metrics.jsonl`: a line per logged update, appended as it happens, cut back to the checkpoint on resume."""

    def __init__(self, file: Path, step: int):
        """Keep the lines up to `step`; -1 starts empty. What is missing among them is in `flaw`, in a few words."""
        self.file, self.flaw = file, ""
        with writing(file):
            texts = self._texts()
            lines = [_metrics(text) for text in texts]
        kept = [line for line in lines if line is not None and line["step"] <= step]
        if step > 0 and not kept:
            self.flaw = f"it has no line of the {step} updates so far"
        elif step > 0 and None in lines[:-1]:  # the last may be cut short by a kill
            self.flaw = f"{lines[:-1].count(None)} of its lines are damaged and left out"
        with atomic(file) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        with writing(file):
            self._open = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - line-buffered for the run's life

    def add(self, step: int, values: dict[str, float]) -> None:
        with writing(self.file):
            self._open.write(json.dumps({"step": step, **values}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The lines, without those that are none of a run: cut short by a kill, whose step will be done again, or
        damaged."""
        return [line for text in self._texts() if (line := _metrics(text)) is not None]

    def _texts(self) -> list[bytes]:
        return self.file.read_bytes().removesuffix(b"\n").split(b"\n") if self.file.exists() else []


def _metrics(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


class Progress:
    """How far a run is: a bar on a terminal; a line now and then where standard error is a file or a pipe."""

    def __init__(self, step: int, total_steps: int, shown: bool, clock: Callable[[], float] = time.monotonic):
        self.step, self.total_steps, self.shown, self.clock = step, total_steps, shown, clock
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._written = clock()
        self._first: tuple[int, float] | None = None  # the first step that was done, and when

    def advance(self, epoch: str, figures: str) -> None:
        """One step is done; `epoch` and `figures` are shown beside it."""
        self.step += 1
        self.bar.set_description(f"epoch {epoch}", refresh=False)
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update()
        now = self.clock()
        first_step, since = self._first = self._first or (self.step, now)  # what came before it may be an evaluation
        due = now - self._written >= LINE_SECONDS or self.step == self.total_steps
        if self.bar.disable and self.shown and due:
            self._written = now
            remaining = ""
            if first_step < self.step < self.total_steps:
                left = (now - since) / (self.step - first_step) * (self.total_steps - self.step)
                remaining = f", {duration(left)} left"
            self.say(f"step {self.step}/{self.total_steps}, epoch {epoch}: {figures}{remaining}")

    def say(self, text: str) -> None:
        """Print on the main process's console, above the bar."""
        if self.shown:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()  # a file of it can be followed, and is complete if the process is killed

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes, or seconds."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Report:
    """Everything that is shown during a run; silent on all processes but the main one."""

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        config_yaml: str,
        settings: dict[str, float | str],
        step: int,
        total_steps: int,
        branch: bool = False,
    ):
        """Keep what was logged up to `step`; -1 starts empty.

        Args:
            branch: whether it was logged in another folder, and only `metrics.jsonl` is a copy. TensorBoard is then
                given it from there, as also where it was not used before.
            settings: of the run, for the table in which TensorBoard compares runs.
        """
        self.accelerator, self.shown = accelerator, accelerator.is_main_process
        self.history = History(output_dir / "metrics.jsonl", step) if self.shown else None
        self.curves, self.board = output_dir, None
        others = [name for name in accelerator.log_with if str(name) != "tensorboard"]
        if len(others) < len(accelerator.log_with):
            self.curves = output_dir / "tensorboard"
            anew = branch or not any(self.curves.glob("*/events*"))
            self.board = Board(self.curves, step + 1, anew) if self.shown else None
            # In place of Accelerate's own, which has neither runs beside each other nor descriptions.
            accelerator.log_with = [*others, self.board] if self.board else others
        with writing(self.curves):
            accelerator.init_trackers(output_dir.name)
            if self.board is not None:
                if anew and self.history is not None:
                    self.board.replay(self.history.read())
                self.board.settings(f"{output_dir.name} in {output_dir.parent}", config_yaml, settings)
        self.progress = Progress(max(step, 0), total_steps, self.shown)
        if self.history is not None and self.history.flaw:
            self.say(f"Note: {self.history.file}: {self.history.flaw}; curves, and the results at the end, lack them")

    def say(self, text: str) -> None:
        """Print on the main process's console, above the progress bar."""
        self.progress.say(text)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the finite scalars of one step to the trackers and the history; JSON has no others."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with writing(self.curves):
            self.accelerator.log(values, step=step)
        if self.history is not None:
            self.history.add(step, values)

    def advance(self, epoch: int, num_epochs: int, scalars: dict[str, float]) -> None:
        """Show one more step."""
        loss, speed = scalars.get("train/loss", math.nan), scalars["train/images_per_second"]
        self.progress.advance(f"{epoch + 1}/{num_epochs}", f"loss {loss:.4f}, {speed:.1f} images/s")

    def picture(self, name: str, step: int, picture: Image.Image, file: Path) -> None:
        """Write a picture to a file and to TensorBoard."""
        if self.shown:
            save_png(picture, file)
            if self.board is not None:
                with writing(self.curves):
                    self.board.picture(name, step, picture)

    def close(self) -> None:
        """Flush and close every tracker. Called by all processes."""
        self.progress.close()
        with writing(self.curves):
            for tracker in self.accelerator.trackers:  # `end_training` would destroy the process group too soon
                tracker.finish()
