"""Text-to-image models of latents: a UNet2DConditionModel in a pipeline of Stable Diffusion 1, 2 or XL."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from finetune.core.kind import Arguments, Batch, Embed, ImageFormat
from finetune.core.shapes import Shape
from finetune.models.checks import check_prediction
from finetune.models.components import Folder
from finetune.models.encoders import PipelineEncoders
from finetune.models.hub import DESCRIPTIONS, file_bytes, write_pipeline
from finetune.models.unet import blocks, fewest_pixels, narrowest, settings_of, without_weights

USAGE = """\
```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH_OR_REPOSITORY")
images = pipeline("{prompt}", num_inference_steps={steps}, guidance_scale=5.0).images
```"""


class StableDiffusion:
    """The kind of model that denoises latents and is conditioned on a caption; see `core.kind.Kind`.

    Attributes:
        network: in torch's default dtype and in training mode. Its `config.sample_size` is that of the latents that are
            trained, so that the exported pipeline generates at the resolution.
    """

    conditional = captioned = True
    export_name = "pipeline"

    def __init__(
        self,
        folder: Folder,
        network: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        encoders: PipelineEncoders,
        made_for: int | None,
        resolution: int,
    ):
        self.folder, self.network, self.noise_scheduler, self.made_for = folder, network, noise_scheduler, made_for
        self._encoders, self.class_names, self.crop_encoder = encoders, list[str](), encoders.crop_encoder
        self.variant = folder.variant
        self.image_format = ImageFormat(encoders.channels, resolution)
        self.divisor = encoders.factor * 2 ** (len(network.config.block_out_channels) - 1)
        self._square = Shape(resolution, resolution)
        self.shapes = [self._square]

    def train_shapes(self, shapes: list[Shape]) -> None:
        """Train pictures of these shapes; raises UserError if the UNet cannot take the latents of one of them."""
        if fewest_pixels(shapes, self.divisor) != fewest_pixels(self.shapes, self.divisor):
            check_shapes(self, shapes)
        self.shapes = shapes

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Arguments]:
        """The scaled latents, (b, c, h, w), and the captions' embeddings.

        SDXL's UNet also reads the original size, the crop's corner and the target size, each (h, w).
        """
        return self._encoders.scaled(self._latents(batch)), self._arguments(batch, batch.get("time_ids"))

    def _latents(self, batch: Batch) -> torch.Tensor:
        """Those of the batch, or drawn from the posteriors of its images; not scaled."""
        if "latents" in batch:
            return batch["latents"]
        posterior, draw = self._encoders.encode(batch["images"]), batch["posterior"]
        return posterior["mean"] + posterior["std"] * draw

    def conditions(
        self, names: Sequence[str | None], device: torch.device, shape: Shape | None = None, embed: Embed | None = None
    ) -> Arguments:
        """The embeddings of prompts; None is no caption.

        Args:
            shape: of the images that are drawn, as if of that original size and not cropped; None: the square.
        """
        assert embed is not None
        told = {name: tensor.to(device) for name, tensor in embed(names).items()}
        return self._arguments(told, self._uncropped(shape or self._square, len(names)).to(device))

    def _arguments(self, told: Batch, time_ids: torch.Tensor | None) -> Arguments:
        arguments: Arguments = {"encoder_hidden_states": told["text"]}
        if "pooled" in told and time_ids is not None:
            times = time_ids.to(told["text"].dtype)
            arguments["added_cond_kwargs"] = {"text_embeds": told["pooled"], "time_ids": times}
        return arguments

    @torch.no_grad()
    def images(self, clean: torch.Tensor) -> torch.Tensor:
        """What the VAE decodes, one at a time: (b, C, H, W), about [-1, 1]; it is loaded until `encoders().free()`."""
        return self._encoders.decode(self._encoders.unscaled(clean), clean.device)

    def encoders(self) -> PipelineEncoders:
        """The pipeline's VAE and text encoders."""
        return self._encoders

    def example(self, count: int, shape: Shape | None = None) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images without captions, on the CPU: of a shape, or of the largest area."""
        shape = shape or max(self.shapes, key=lambda shape: shape.area)
        blank = self.encoded_example(count, shape)
        if self.crop_encoder is None:
            return blank
        pixels = torch.zeros(count, self.image_format.channels, *shape, dtype=torch.uint8)
        return {"images": pixels, "posterior": blank.pop("latents"), **blank}

    def encoded_example(self, count: int, shape: Shape) -> dict[str, torch.Tensor]:
        """The same of images that are encoded already, which needs no VAE."""
        blank = {name: torch.zeros(count, *field) for name, field in self._encoders.text_fields.items()}
        blank |= {name: torch.zeros(count, *self._encoders.latents(shape)) for name in ("latents", "noise")}
        if self._encoders.sized:
            blank["time_ids"] = self._uncropped(shape, count)
        return blank

    @staticmethod
    def _uncropped(shape: Shape, count: int) -> torch.Tensor:
        """SDXL's sizes of pictures that have a shape from the start: original size, crop, target size, (count, 6)."""
        return torch.tensor([[*shape, 0, 0, *shape]] * count)

    def blocks(self) -> list[torch.nn.Module]:
        """The parts of the UNet whose weights are needed at once, inner ones before those around them."""
        return blocks(self.network)

    def without_memory(self) -> UNet2DConditionModel:
        """A copy of the network on the meta device: its shapes, without weights."""
        return without_weights(self.network)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of the UNet that are not frozen, by name."""
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}

    def pipeline(self) -> Any:
        """The pipeline of the present weights, with the encoders and the noise scheduler that it came with."""
        folder = self.folder
        parts = {part: folder.load(part) for part in ("vae", *folder.text_encoders)}
        parts |= dict(zip(folder.tokenizers, self._encoders.tokenizers, strict=True))
        return folder.pipeline(unet=self.network, scheduler=self.sampler(), **parts, **folder.load_checker())

    def sampler(self) -> Any:
        """The noise scheduler that the pipeline came with, with the settings that the run's config changes in it."""
        scheduler_class = getattr(diffusers, self.folder.index["scheduler"][1])
        changed = {key: self.noise_scheduler.config[key] for key in ("prediction_type", "rescale_betas_zero_snr")}
        return scheduler_class.from_config(self.noise_scheduler.config, **changed)

    def save(self, folder: Path) -> None:
        """Write the pipeline of the present weights into a folder."""
        write_pipeline(self.pipeline(), folder)

    def export_bytes(self) -> int:
        """Bytes that `save` writes, at most: the UNet, and all components that it came with in float32."""
        parts = sum(map(self.folder.saved_bytes, ("vae", *self.folder.text_encoders, *self.folder.checkers)))
        vocabularies = sum(len(each.backend_tokenizer.to_str(True).encode()) for each in self._encoders.tokenizers)
        return file_bytes(self.network.parameters()) + parts + vocabularies + DESCRIPTIONS

    def usage(self, inference_steps: int, prompt: str) -> str:
        """How the exported pipeline is called, in Markdown."""
        return USAGE.format(
            pipeline=self.folder.pipeline_class.__name__,
            prompt=quoted(prompt),
            steps=inference_steps,
        )

    def identity(self) -> dict[str, Any]:
        """The configs of the UNet and of the noise scheduler, and hashes of the encoders."""

        encoders = {"vae": self._encoders.image_key, "text_encoders": self._encoders.text_key}
        return {
            "unet": settings_of(self.network),
            "noise_scheduler": settings_of(self.noise_scheduler),
            "encoders": encoders,
        }


def quoted(prompt: str) -> str:
    """A prompt that can stand between double quotes."""
    return prompt.replace("\\", "").replace('"', "'")


def check_shapes(kind: StableDiffusion, shapes: Sequence[Shape]) -> None:
    """Raises UserError if the UNet cannot take the latents of one of these shapes, or predicts what is not finite."""
    clean, conditions = kind.inputs(kind.encoded_example(1, fewest_pixels(shapes, kind.divisor)))
    tried = narrowest(shapes)
    problem = f"model: the UNet of {kind.folder.name} cannot denoise the latents of images of {tried} pixels"
    check_prediction(kind.network, kind.noise_scheduler, clean, conditions, problem)
