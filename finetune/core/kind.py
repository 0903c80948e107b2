"""What the rest of the program may ask of a kind of model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin

Batch = Mapping[str, torch.Tensor]


class ImageFormat(NamedTuple):
    """The pictures that a model is trained on."""

    channels: int
    resolution: int  # pixels a side


class Kind(Protocol):
    """A kind of model: the only code that knows how its network is called and what a batch holds for it.

    Attributes:
        network: the network that is trained, without the wrappers that Accelerate puts around it.
        noise_scheduler: noises its inputs, and names its prediction type.
        image_format: what it needs of the data.
        conditional: whether it is told something about an image beside its pixels, which may be dropped.
        class_names: the classes that it knows by name; none unless it is class-conditional.
        made_for: pixels a side that the model came with; None where it names no square.
    """

    network: ModelMixin
    noise_scheduler: DDPMScheduler
    image_format: ImageFormat
    conditional: bool
    class_names: list[str]
    made_for: int | None

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The clean tensor that is noised, (b, C, H, W) in [-1, 1], and the network's other arguments by name."""
        ...

    def conditions(self, names: Sequence[str | None], device: torch.device) -> dict[str, torch.Tensor]:
        """The network's other arguments for conditions by name, to sample with; None means unconditional."""
        ...

    def example(self, count: int) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images as the data would make it, on the CPU."""
        ...

    def without_memory(self) -> ModelMixin:
        """A copy of the network on the meta device: its shapes, without weights."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        ...

    def pipeline(self) -> DiffusionPipeline:
        """The diffusers pipeline of the present weights, to sample from and to export."""
        ...

    def usage(self, inference_steps: int) -> str:
        """How the exported pipeline is called, in Markdown, for its model card."""
        ...

    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed."""
        ...
