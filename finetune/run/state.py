"""Where a run is, how long it is, and which run it is."""

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

from finetune.config.schema import Config
from finetune.core.batch import window_range, windows_per_epoch
from finetune.core.kind import Kind

T = TypeVar("T")


@dataclass
class RunState:
    """Where a run is. Everything else about its place (epoch, window, learning rate) follows from the step."""

    step: int = 0  # windows completed; each is an update, unless it was skipped
    skipped: int = 0  # windows whose update was not applied: overflow under fp16, or a loss that was not finite
    skipped_in_a_row: int = 0
    validated: int = -1  # the step of the last complete validation
    sampled: int = -1  # the step of the last complete sample grid
    measured: int = -1  # the step of the last measurement of quality
    best_step: int = -1  # the step with the lowest kernel distance, of those with an update
    best_distance: float | None = None
    base_loss: float | None = None  # of the pretrained model on held-out images, as it was before the first update
    seconds: float = 0.0  # of training, over all starts
    branches: list[str] = field(default_factory=list)  # digests of the checkpoints that checkpoint.resume named so far

    @property
    def updates(self) -> int:
        """Updates that were applied, which is what the schedule and the moving average count."""
        return self.step - self.skipped


@dataclass(frozen=True)
class Length:
    """How many updates a run has, and which images each of them takes."""

    num_images: int
    global_batch_size: int
    total_steps: int

    @classmethod
    def of(cls, config: Config, num_images: int, global_batch_size: int) -> "Length":
        """The length that a config asks for: `max_train_steps`, or else `num_epochs`."""
        training = config.training
        epochs = (training.num_epochs or 0) * windows_per_epoch(num_images, global_batch_size)
        return cls(num_images, global_batch_size, training.max_train_steps or epochs)

    @property
    def steps_per_epoch(self) -> int:
        return windows_per_epoch(self.num_images, self.global_batch_size)

    @property
    def num_epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.total_steps // self.steps_per_epoch)

    def interval(self, every_steps: int | None) -> int:
        """Updates between two evaluations: as the config says, or a tenth of the run."""
        return every_steps or max(self.total_steps // 10, 1)

    def place(self, step: int) -> tuple[int, int]:
        """The epoch, and the window in it, that follow after a step."""
        return divmod(step, self.steps_per_epoch)

    def positions(self, step: int) -> range:
        """The positions, in their epoch's order, of the window that follows after a step."""
        return window_range(self.place(step)[1], self.num_images, self.global_batch_size)

    def images_until(self, step: int) -> int:
        """Images in the first `step` windows."""
        epochs, windows = self.place(step)
        return epochs * self.num_images + windows * self.global_batch_size


def from_json(kind: type[T], values: object) -> T:
    """A dataclass from JSON, the inverse of `dataclasses.asdict`; raises ValueError for fields of other types."""
    return TypeAdapter(kind).validate_python(values)


def identity(config: Config, data_fingerprint: str, kind: Kind, global_batch_size: int) -> dict[str, Any]:
    """Settings that must not change on resume, as they come back from JSON.

    Args:
        data_fingerprint: of the images' content.
    """
    options = {"data": {"order", "crop", "random_flip"}, "model": {"pretrained"}}
    options["training"] = {"timestep_sampling", "snr_gamma", "condition_dropout", "noise_offset"}
    options["ema"] = {"enabled"}
    settings = config.model_dump(mode="json", include={"seed": True, **options})
    settings["training"]["global_batch_size"] = global_batch_size
    settings["data"]["fingerprint"] = data_fingerprint
    if config.data.buckets is not None:
        settings["data"]["shapes"] = [str(shape) for shape in kind.shapes]
    return json.loads(json.dumps(settings | kind.identity()))


class Change(NamedTuple):
    """A setting that is another than in a checkpoint; as text `optimizer.eps: 1e-08 in the checkpoint, 1e-06 now`."""

    key: str  # with those that lead to it, as in `optimizer.eps`
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} in the checkpoint, {self.now!r} now"


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[Change]:
    """How two nested mappings differ; a key that one of them lacks has the value None there."""
    found = []
    for key in dict.fromkeys([*saved, *current]):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += [change._replace(key=f"{key}.{change.key}") for change in differences(before, now)]
        elif before != now:
            found.append(Change(key, before, now))
    return found
