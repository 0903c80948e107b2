"""What the rest of the program may ask of a kind of model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin

from finetune.core.shapes import Shape

Batch = Mapping[str, torch.Tensor]
"""What a micro-batch of b images holds, by name:

- `noise` (b, C, H, W) as the clean tensor, `timesteps` int64 (b,), `weights` (b,), of every kind of model;
- pixel models: `images` uint8 (b, C, H, W);
- latent models: `latents` (b, C, h, w), drawn from the posterior and not scaled; with random crops instead `images` as
  above and the standard normal `posterior` (b, C, h, w) to draw them with; of the caption, or of none where it is
  dropped, `text` (b, tokens, width), and where the pipeline has them `pooled` (b, width) and `time_ids` (b, 6);
- models of classes: `labels` int64 (b,), and which of them are `dropped`, bool (b,).
"""
Arguments = dict[str, Any]  # a network's arguments by name: tensors, or mappings of tensors
Fields = dict[str, tuple[int, ...]]  # tensors by name, with the shape of one entry
Embed = Callable[[Sequence[str | None]], dict[str, torch.Tensor]]
"""Embeddings of b texts, by name and each (b, ...); of None what stands for no caption."""


def predict(
    network: torch.nn.Module, noisy_images: torch.Tensor, timesteps: torch.Tensor, conditions: Arguments
) -> torch.Tensor:
    """The network's output, (b, C, H, W) as its input.

    Args:
        network: of a kind of model: the one that is trained, a copy, or a wrapper around one of them.
        timesteps: int64 (b,), or one for all.
        conditions: its other arguments, from `Kind.inputs` or `Kind.conditions`.
    """
    output: torch.Tensor = network(noisy_images, timesteps, **conditions).sample
    return output


class ImageFormat(NamedTuple):
    """The pictures that a model is trained on."""

    channels: int
    resolution: int  # pixels a side


class Encoders(Protocol):
    """Frozen networks that turn images and captions, once, into what the batches of a latent model hold.

    They are loaded when they first encode, and are in memory until `free`, or throughout where crops are random.

    Attributes:
        image_key, text_key: hashes of all that an encoded image or text depends on, apart from itself.
        text_fields: what a text becomes: `text`, and `pooled` where the pipeline has it.
        text_chunk: how many are encoded at once: always exactly this many, so that an entry never depends on others.
        no_text: the text that stands for no caption; None: zeros in place of an embedding do.
        sized: whether the network is conditioned on the size and crop of an image.
    """

    image_key: str
    text_key: str
    text_fields: Fields
    text_chunk: int
    no_text: str | None
    sized: bool

    def image_fields(self, shape: Shape) -> Fields:
        """What an image of a shape becomes: `mean` and `std` of its posterior."""
        ...

    def image_chunk(self, shape: Shape) -> int:
        """How many images of a shape are encoded at once: always exactly this many."""
        ...

    def images(self, pixels: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """The posteriors of uint8 (b, C, H, W), of one shape, in float32 on the CPU."""
        ...

    def texts(self, texts: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The embeddings of texts, in float32 on the CPU."""
        ...

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that have more tokens than are read."""
        ...

    def free(self) -> None:
        """Release the networks' memory, but for what encodes random crops."""
        ...


class Kind(Protocol):
    """A kind of model: the only code that knows how its network is called and what a batch holds for it.

    Attributes:
        network: the network that is trained, without the wrappers that Accelerate puts around it.
        noise_scheduler: noises its inputs, and names its prediction type.
        image_format: what it needs of the data.
        conditional: whether it is conditioned on a class or caption, which may be dropped.
        captioned: whether that is a caption.
        class_names: the classes that it knows by name; none unless it is class-conditional.
        export_name: of the folder of a finished run that `save` writes.
        made_for: pixels a side that the model came with; None where it names no square.
        variant: such as fp16, if the pretrained weights have no other; else None.
        divisor: what both sides of a picture have to be multiples of.
        shapes: of the pictures that are trained; the square of the image format, unless `train_shapes` sets others.
        crop_encoder: on the meta device, the network that `inputs` encodes random crops with, which is in memory while
            updates run; None where images are encoded before, or not at all.
    """

    network: ModelMixin
    noise_scheduler: DDPMScheduler
    image_format: ImageFormat
    conditional: bool
    captioned: bool
    class_names: list[str]
    export_name: str
    made_for: int | None
    variant: str | None
    divisor: int
    shapes: list[Shape]
    crop_encoder: ModelMixin | None

    def train_shapes(self, shapes: list[Shape]) -> None:
        """Train pictures of these shapes; raises UserError if the network cannot take one of them."""
        ...

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Arguments]:
        """The clean tensor that is noised, (b, C, H, W), and the network's other arguments by name."""
        ...

    def images(self, clean: torch.Tensor) -> torch.Tensor:
        """The images that clean tensors stand for, (b, C, H, W) in [-1, 1] if the network is right.

        What makes images of latents stays loaded until `encoders().free()`, since there may be more to make.
        """
        ...

    def conditions(
        self, names: Sequence[str | None], device: torch.device, shape: Shape | None = None, embed: Embed | None = None
    ) -> Arguments:
        """The network's other arguments to sample with, for classes by name or for prompts; None is no condition.

        Args:
            shape: of the images that are drawn; None: the square of the image format.
            embed: what a model of captions needs, to make embeddings of the prompts.
        """
        ...

    def encoders(self) -> Encoders | None:
        """What encodes images and captions once, before training; None for models of pixels."""
        ...

    def example(self, count: int, shape: Shape | None = None) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images as the data would make it, on the CPU: of a shape, or of the largest area."""
        ...

    def blocks(self) -> list[torch.nn.Module]:
        """The parts of the network whose weights are needed at once, inner ones before those around them."""
        ...

    def without_memory(self) -> ModelMixin:
        """A copy of the network on the meta device: its shapes, without weights."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        ...

    def pipeline(self) -> DiffusionPipeline:
        """The diffusers pipeline of the present weights."""
        ...

    def save(self, folder: Path) -> None:
        """Write what others load of the present weights into a folder.

        Raises:
            UserError: if the output of what was written, loaded again, differs from the network's.
        """
        ...

    def export_bytes(self) -> int:
        """Bytes that `save` writes, at most: known before the training, for the check of the disk."""
        ...

    def usage(self, inference_steps: int, prompt: str) -> str:
        """How the export is used, in Markdown, for its model card; the prompt is for a model of captions."""
        ...

    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed."""
        ...
