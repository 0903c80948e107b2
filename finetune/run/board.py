"""TensorBoard: training and validation as runs beside each other, so that the same quantity is one chart.

TensorBoard gives each run a colour and each tag a chart. The runs are folders below <output_dir>/tensorboard.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from torch.utils.tensorboard import SummaryWriter

TRAIN, VALIDATION, AVERAGED, UNCONDITIONAL = "train", "validation", "validation_ema", "validation_unconditional"
BASE = "validation_base"
_EVENTS = "events.out.tfevents."
_SETTINGS = ".settings"  # suffix of the event file that each start writes anew

# Where a scalar of metrics.jsonl is shown: its run and its tag. Charts are sorted by tag, so `loss` comes first.
PLACES = {
    "train/loss_smoothed": (TRAIN, "loss"),
    "validation/loss": (VALIDATION, "loss"),
    "validation/loss_ema": (AVERAGED, "loss"),
    "validation/loss_unconditional": (UNCONDITIONAL, "loss"),
    "validation/loss_base": (BASE, "loss"),
    "validation/condition_gain": (VALIDATION, "loss/condition_gain"),
    "train/loss": (TRAIN, "loss/each_update"),
    "train/epoch_loss": (TRAIN, "loss/epoch_mean"),
    "train/learning_rate": (TRAIN, "optimizer/learning_rate"),
    "train/grad_norm": (TRAIN, "optimizer/gradient_norm"),
    "train/gradient_noise_scale": (TRAIN, "optimizer/gradient_noise_scale"),
    "train/skipped_updates": (TRAIN, "optimizer/skipped_updates"),
    "train/epoch": (TRAIN, "progress/epoch"),
    "train/images_per_second": (TRAIN, "progress/images_per_second"),
    "validation/frechet_distance": (AVERAGED, "quality/frechet_distance"),
    "validation/kernel_distance": (AVERAGED, "quality/kernel_distance"),
}
DESCRIPTIONS = {
    "loss": "Mean squared error of the prediction (no unit). **train**: corrected for which timesteps were drawn, and "
    "averaged over recent updates. **validation**: held-out images at fixed noise and timesteps. **validation_ema**: "
    "the same with the averaged weights, which are the ones exported. **validation_unconditional**: without the "
    "images' classes or captions. **validation_base**: before the first update. The curves need no more smoothing: set "
    "the slider under *Smoothing* to 0.",
    "loss/each_update": "Mean squared error over the images of one update, on all processes (no unit). Most of its "
    "scatter comes from which timesteps were drawn: set the slider under *Smoothing* to 0.9 or more, or read `loss`.",
    "loss/epoch_mean": "Mean squared error over the images of one epoch (no unit), each counted once.",
    "loss/condition_gain": "Validation loss without the images' classes or captions, minus the loss with them (no "
    "unit): what they tell the network.",
    "loss_by_timestep": "Mean squared error (no unit) of the images whose timestep lies in this range; a higher "
    "timestep is more noise. **train** has a few images an update here: set the slider under *Smoothing* to 0.9. "
    "**validation** needs none.",
    "optimizer/learning_rate": "Learning rate of the update.",
    "optimizer/gradient_norm": "L2 norm of the update's gradient, before clipping.",
    "optimizer/gradient_noise_scale": "In images: a larger global batch than this brings little "
    "([McCandlish et al. 2018](https://arxiv.org/abs/1812.06162)).",
    "optimizer/skipped_updates": "Updates so far that were not applied, because of an overflow in half precision or a "
    "loss that was not finite.",
    "progress/epoch": "Passes over the training images so far.",
    "progress/images_per_second": "Images trained on per second, on all processes, without validation, sampling and "
    "saving.",
    "quality/frechet_distance": "Fréchet distance between samples of the averaged weights and held-out images, in the "
    "features of an image model (no unit); lower is better, and comparable at equal numbers of images only.",
    "quality/kernel_distance": "Kernel distance (KID, unbiased) between samples of the averaged weights and held-out "
    "images, in the features of an image model (no unit); lower is better, 0 for the same distribution.",
    "time/data": "Seconds of the update spent waiting for data.",
    "time/compute": "Seconds of the update in forward and backward passes.",
    "time/update": "Seconds of the update in gradient clipping and the optimizer's step.",
    "time/logging": "Seconds spent logging the update before.",
}
CHARTS = {  # Custom Scalars: one tag a chart, since it colours by run and not by tag
    "Loss": {
        "training and validation": ["Multiline", ["^loss$"]],
        "each update": ["Multiline", ["^loss/each_update$"]],
    },
    "Batch": {"gradient noise scale, in images": ["Multiline", ["^optimizer/gradient_noise_scale$"]]},
}
METRICS = ("train/epoch_loss", "train/loss_smoothed", "validation/loss", "validation/loss_ema")  # columns in HPARAMS


def place(name: str) -> tuple[str, str]:
    """The run and the tag under which TensorBoard shows a scalar of metrics.jsonl."""
    if name in PLACES:
        return PLACES[name]
    first, _, rest = name.partition("/")
    if rest.startswith("loss_by_timestep/"):
        return first, rest
    return (first, f"other/{rest}") if first in (TRAIN, VALIDATION) else (TRAIN, name)


def description(tag: str) -> str:
    """What a tag shows, and in which unit; Markdown."""
    return DESCRIPTIONS.get(tag) or DESCRIPTIONS.get(tag.split("/")[0], "")


class Board(GeneralTracker):  # type: ignore[misc] # Accelerate has no types
    """A tracker for Accelerate that writes <output_dir>/tensorboard. Only the main process has one.

    A start opens event files of its own; what earlier ones hold from its first step on is purged, so that the history
    over all starts is continuous.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, folder: Path, first_step: int, anew: bool = False):
        """Nothing is written before `start`.

        Args:
            first_step: the first step that this start may log.
            anew: purge also what is older, for `replay` to write it.
        """
        super().__init__()
        self.folder, self.first_step, self.purged_from = folder, first_step, 0 if anew else first_step
        self.writers: dict[str, SummaryWriter] = {}
        self._described: set[tuple[str, str]] = set()  # a description is stored once a file, not once a point

    @property
    def tracker(self) -> dict[str, SummaryWriter]:
        return self.writers

    def start(self) -> None:
        """Open the runs, and so purge what earlier starts wrote.

        TensorBoard gives out its colours in this order: orange, blue. The others are opened when they are needed.
        """
        for run in (TRAIN, VALIDATION, AVERAGED, UNCONDITIONAL, BASE):
            if run in (TRAIN, VALIDATION) or (self.folder / run).is_dir():
                self._writer(run)

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self.writers:
            keep_order(self.folder / run, int(time.time()))
            self.writers[run] = SummaryWriter(str(self.folder / run), purge_step=self.purged_from)
        return self.writers[run]

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        """Write scalars named as in metrics.jsonl, and flush them to disk."""
        for run in self._write(values, step):
            self.writers[run].flush()

    def replay(self, lines: Iterable[dict[str, float]]) -> None:
        """Write the lines of metrics.jsonl of starts that had no TensorBoard here."""
        for line in lines:
            self._write({name: value for name, value in line.items() if name != "step"}, int(line["step"]))
        for writer in self.writers.values():
            writer.flush()

    def _write(self, values: dict[str, float], step: int | None) -> Iterable[str]:
        """Write scalars; returns the runs that they belong to."""
        summaries: dict[str, Summary] = {}
        for name, number in values.items():
            run, tag = place(name)
            described = scalar_pb(tag, number, description(tag))  # TensorBoard drops that of add_scalar's old format
            if (run, tag) in self._described:
                described.value[0].ClearField("metadata")
            self._described.add((run, tag))
            summaries.setdefault(run, Summary()).MergeFrom(described)
        for run, summary in summaries.items():
            _add(self._writer(run), summary, step)
        return summaries

    def picture(self, name: str, step: int, picture: Image.Image) -> None:
        """Write a picture; those are made by evaluations, and so belong to the run `validation`."""
        pixels = np.asarray(picture.convert("RGB"))
        self._writer(VALIDATION).add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    def settings(self, name: str, config_yaml: str, values: dict[str, float | str]) -> None:
        """Write what TensorBoard shows beside the curves: the config, a row in HPARAMS, and the custom charts.

        HPARAMS reads the metrics of the row from the curves, so an interrupted run has them too. TensorBoard keeps the
        first settings that it reads: those of earlier starts are removed, and a TensorBoard that is open while a run is
        resumed shows the new ones after it was started again.

        Args:
            name: of the row.
            values: the row's settings.
        """
        for file in self.folder.glob(f"events*{_SETTINGS}"):
            file.unlink()
        self._writer(TRAIN).add_text("config", f"```yaml\n{config_yaml}```", self.first_step)
        with SummaryWriter(str(self.folder), filename_suffix=_SETTINGS) as writer:
            metrics = [hparams.Metric(place(metric)[1], place(metric)[0], display_name=metric) for metric in METRICS]
            columns = [hparams.HParam(value) for value in values]
            _add(writer, hparams.hparams_config_pb(columns, metrics))
            _add(writer, hparams.hparams_pb(values, trial_id=name))
            writer.add_custom_scalars(CHARTS)

    def finish(self) -> None:
        """Flush and close."""
        for writer in self.writers.values():
            writer.close()


def keep_order(folder: Path, now: int) -> None:
    """Have the event files of a folder come before one that is made now.

    TensorBoard reads them in the order of their names, which begin with the second of their making. Of a start on a
    host whose clock is behind, or within the same second, it would take the new points for old ones, and purge them.
    """
    for file in sorted(folder.glob(f"{_EVENTS}*"), reverse=True):
        made, _, rest = file.name.removeprefix(_EVENTS).partition(".")
        if not made.isdecimal() or int(made) < now:
            return
        now -= 1
        file.rename(folder / f"{_EVENTS}{now:010d}.{rest}")


def _add(writer: SummaryWriter, summary: Summary, step: int | None = None) -> None:
    file_writer: Any = writer.file_writer  # None only after it was closed
    file_writer.add_summary(summary, step)
