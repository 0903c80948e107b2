"""Unconditional pixel models: a UNet2DModel and its noise scheduler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel

from finetune.config.inputs import ModelConfig
from finetune.core.kind import Arguments, Batch, Embed, Encoders, ImageFormat
from finetune.core.shapes import Shape
from finetune.models.checks import check_prediction, check_settings
from finetune.models.hub import DESCRIPTIONS, file_bytes, variant, write_pipeline
from finetune.models.noise_schedulers import build_noise_scheduler
from finetune.models.pixel_unet import build_unet, check_unet, load_unet, read_pretrained, training_resolution
from finetune.models.unet import blocks, fewest_pixels, narrowest, outline, own_resolution, settings_of, without_weights

USAGE = """\
```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("PATH_OR_REPOSITORY")
images = pipeline(batch_size=4, num_inference_steps={steps}).images
```"""


class Unconditional:
    """The kind of model that denoises pixels, without conditions; see `core.kind.Kind`.

    Attributes:
        network: in torch's default dtype and in training mode. Its `config.sample_size` is the resolution that is
            trained, so that the exported pipeline generates at it.
        stored_class_names: classes that the pretrained pipeline names, if its network has an embedding of them.
    """

    conditional = captioned = False
    crop_encoder: ModelMixin | None = None
    export_name = "pipeline"

    def __init__(
        self,
        network: UNet2DModel,
        noise_scheduler: DDPMScheduler,
        made_for: int | None = None,
        stored_class_names: list[str] | None = None,
        variant: str | None = None,
    ):
        self.network, self.noise_scheduler, self.made_for = network, noise_scheduler, made_for
        self.stored_class_names, self.class_names = stored_class_names, list[str]()
        self.variant = variant
        self.image_format = ImageFormat(network.config.in_channels, network.config.sample_size)
        self.divisor = 2 ** (len(network.config.block_out_channels) - 1)
        self.shapes = [Shape(self.image_format.resolution, self.image_format.resolution)]

    def train_shapes(self, shapes: list[Shape]) -> None:
        """Train pictures of these shapes; raises UserError if the network cannot take one of them."""
        if fewest_pixels(shapes, self.divisor) != fewest_pixels(self.shapes, self.divisor):
            _check_shapes(self, shapes)
        self.shapes = shapes

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Arguments]:
        """The images in [-1, 1], (b, C, H, W), and no other arguments.

        The uint8 pixels become floats here, on the device, at a quarter of the transfer.
        """
        return batch["images"].to(batch["noise"].dtype) / 127.5 - 1.0, {}

    def images(self, clean: torch.Tensor) -> torch.Tensor:
        """The same: this network denoises pixels."""
        return clean

    def conditions(
        self, names: Sequence[str | None], device: torch.device, shape: Shape | None = None, embed: Embed | None = None
    ) -> Arguments:
        """None: there is nothing to tell this network."""
        return {}

    def encoders(self) -> Encoders | None:
        """None: pixels are trained on as they are."""
        return None

    def example(self, count: int, shape: Shape | None = None) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images as the data would make it, on the CPU: of a shape, or of the largest area."""
        sides = shape or max(self.shapes, key=lambda shape: shape.area)
        size = (count, self.image_format.channels, *sides)
        return {"images": torch.zeros(size, dtype=torch.uint8), "noise": torch.zeros(size)}

    def blocks(self) -> list[torch.nn.Module]:
        """The parts of the UNet whose weights are needed at once, inner ones before those around them."""
        return blocks(self.network)

    def without_memory(self) -> UNet2DModel:
        """A copy of the network on the meta device: its shapes, without weights."""
        return without_weights(self.network)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, by name."""
        return dict(self.network.named_parameters())

    def pipeline(self) -> DDPMPipeline:
        """A DDPMPipeline of the present weights."""
        return DDPMPipeline(unet=self.network, scheduler=self.noise_scheduler)

    def save(self, folder: Path) -> None:
        """Write the pipeline of the present weights into a folder."""
        write_pipeline(self.pipeline(), folder)

    def export_bytes(self) -> int:
        """Bytes that `save` writes, at most."""
        return file_bytes(self.network.parameters()) + DESCRIPTIONS

    def usage(self, inference_steps: int, prompt: str) -> str:
        """How the exported pipeline is called, in Markdown."""
        return USAGE.format(steps=inference_steps)

    def identity(self) -> dict[str, Any]:
        """The configs of the network and of the noise scheduler."""
        return {"unet": settings_of(self.network), "noise_scheduler": settings_of(self.noise_scheduler)}


class UnconditionalOutline:
    """A model as its config describes it: its shapes, on the meta device, without memory for weights.

    Attributes:
        network: of these shapes.
        crop_encoder: None, since crops are trained on as they are.
    """

    crop_encoder: ModelMixin | None = None

    def __init__(self, config: ModelConfig, folder: Path | None, resolution: int | None):
        """
        Args:
            folder: of the pretrained pipeline, if the config names one.
            resolution: pixels a side to train at; None: what the model was made for.

        Raises:
            UserError: one line that names the key, what was found and what was expected.
        """
        self.config, self.pretrained = config, None
        if folder is not None:
            self.pretrained = read_pretrained(str(config.pretrained), folder)
            where = f"model.pretrained: {self.pretrained.folder / 'config.json'}"
            unet = outline(UNet2DModel, self.pretrained.config, where)
        else:
            check_settings("model.unet", config.unet or {}, UNet2DModel)
            unet = outline(UNet2DModel, config.unet or {}, "model.unet")
        scheduler_config = self.pretrained.scheduler_config if self.pretrained else {}
        self.noise_scheduler = build_noise_scheduler(scheduler_config, config.noise_scheduler)
        check_unet(unet, self.noise_scheduler, config)
        self.made_for = own_resolution(unet.config.sample_size)
        unet.register_to_config(sample_size=training_resolution(unet, resolution))
        self.network = unet

    def _kind(self, network: UNet2DModel) -> Unconditional:
        if self.pretrained is None:
            return Unconditional(network, self.noise_scheduler, self.made_for)
        named = self.pretrained.class_names, variant(self.pretrained.folder)
        return Unconditional(network, self.noise_scheduler, self.made_for, *named)

    def load(self, seed: int) -> Unconditional:
        """The model with its pretrained weights, or with initial ones that the seed decides.

        Raises:
            UserError: if they cannot be loaded safely, or what the network predicts is not finite.
        """
        unet = load_unet(self.pretrained.folder) if self.pretrained else build_unet(self.config.unet or {}, seed)
        unet.register_to_config(sample_size=self.network.config.sample_size)
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        kind = self._kind(unet.train())
        _check_shapes(kind, kind.shapes)
        return kind


def _check_shapes(kind: Unconditional, shapes: Sequence[Shape]) -> None:
    """Raises UserError if the network cannot take pictures of one of these shapes, or predicts what is not finite."""
    clean, _ = kind.inputs(kind.example(1, fewest_pixels(shapes, kind.divisor)))
    # Where the network has an embedding of classes, which are named later: the first one.
    conditions = {} if kind.network.class_embedding is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
    problem = f"model: a UNet2DModel of this config cannot denoise images of {narrowest(shapes)} pixels"
    check_prediction(kind.network, kind.noise_scheduler, clean, conditions, problem)
