"""Unconditional pixel models: a UNet2DModel and its noise scheduler."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from finetune.config.schema import ModelConfig
from finetune.core.errors import UserError, first_line
from finetune.core.failures import is_out_of_memory
from finetune.core.kind import Batch, ImageFormat
from finetune.models.hub import check_keys
from finetune.models.noise_schedulers import build_noise_scheduler
from finetune.models.unet import (
    build_unet,
    check_unet,
    load_unet,
    outline_unet,
    own_resolution,
    read_pretrained,
    training_resolution,
)

USAGE = """\
```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("PATH_OR_REPOSITORY")
images = pipeline(batch_size=4, num_inference_steps={steps}).images
```"""


class Unconditional:
    """The kind of model that denoises pixels and is told nothing else; see `core.kind.Kind`.

    Attributes:
        network: in torch's default dtype and in training mode. Its `config.sample_size` is the resolution that is
            trained, so that the exported pipeline generates at it.
        stored_class_names: classes that the pretrained pipeline names, if its network has an embedding of them.
    """

    conditional = False

    def __init__(
        self,
        network: UNet2DModel,
        noise_scheduler: DDPMScheduler,
        made_for: int | None = None,
        stored_class_names: list[str] | None = None,
    ):
        self.network, self.noise_scheduler, self.made_for = network, noise_scheduler, made_for
        self.stored_class_names, self.class_names = stored_class_names, list[str]()
        self.image_format = ImageFormat(network.config.in_channels, network.config.sample_size)

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The images in [-1, 1], (b, C, H, W), and no other arguments.

        The uint8 pixels become floats here, on the device, at a quarter of the transfer.
        """
        return batch["images"].to(batch["noise"].dtype) / 127.5 - 1.0, {}

    def conditions(self, names: Sequence[str | None], device: torch.device) -> dict[str, torch.Tensor]:
        """None: there is nothing to tell this network."""
        return {}

    def example(self, count: int) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images as the data would make it, on the CPU."""
        channels, resolution = self.image_format
        shape = (count, channels, resolution, resolution)
        return {"images": torch.zeros(shape, dtype=torch.uint8), "noise": torch.zeros(shape)}

    def without_memory(self) -> UNet2DModel:
        """A copy of the network on the meta device: its shapes, without weights."""
        # diffusers lists settings that were left at their defaults, and ignores what was registered for them later.
        settings = {key: value for key, value in self.network.config.items() if key != "_use_default_values"}
        with torch.device("meta"):
            return UNet2DModel.from_config(settings)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, by name."""
        return dict(self.network.named_parameters())

    def pipeline(self) -> DDPMPipeline:
        """A DDPMPipeline of the present weights."""
        return DDPMPipeline(unet=self.network, scheduler=self.noise_scheduler)

    def usage(self, inference_steps: int) -> str:
        """How the exported pipeline is called, in Markdown."""
        return USAGE.format(steps=inference_steps)

    def identity(self) -> dict[str, Any]:
        """The configs of the network and of the noise scheduler."""

        def settings(component: UNet2DModel | DDPMScheduler) -> dict[str, Any]:
            return {key: value for key, value in component.config.items() if not key.startswith("_")}

        return {"unet": settings(self.network), "noise_scheduler": settings(self.noise_scheduler)}


def outline_unconditional(config: ModelConfig, resolution: int | None) -> Unconditional:
    """The model that `load_unconditional` loads, on the meta device: its shapes, without memory for weights.

    Args:
        resolution: pixels a side to train at; None: what the model was made for.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    if config.pretrained is not None:
        pretrained = read_pretrained(config.pretrained)
        unet = outline_unet(pretrained.config, f"model.pretrained: {pretrained.folder / 'config.json'}")
    else:
        pretrained = None
        check_keys("model.unet", config.unet or {}, UNet2DModel)
        unet = outline_unet(config.unet or {}, "model.unet")
    noise_scheduler = build_noise_scheduler(pretrained.scheduler_config if pretrained else {}, config.noise_scheduler)
    check_unet(unet, noise_scheduler, config)
    made_for = own_resolution(unet.config.sample_size)
    unet.register_to_config(sample_size=training_resolution(unet, resolution))
    kind = Unconditional(unet, noise_scheduler, made_for, pretrained.class_names if pretrained else None)
    _check_forward(kind)
    return kind


def load_unconditional(config: ModelConfig, resolution: int | None, seed: int) -> Unconditional:
    """Load a pretrained model, or build one from a config with initial weights that the seed decides.

    Args:
        resolution: pixels a side to train at; None: what the model was made for.

    Raises:
        UserError: one line that names the key, what was found and what was expected.
    """
    kind = outline_unconditional(config, resolution)
    if config.pretrained is not None:
        unet = load_unet(read_pretrained(config.pretrained).folder)
    else:
        unet = build_unet(config.unet or {}, seed)
    unet.register_to_config(sample_size=kind.image_format.resolution)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    kind.network = unet.train()
    _check_finite(kind)
    return kind


def _check_forward(kind: Unconditional) -> None:
    """Not all blocks that can be built fit together; tried on tensors without memory."""
    size = kind.image_format.resolution
    problem = f"model: a UNet2DModel of this config cannot denoise images of {size} x {size} pixels"
    with torch.device("meta"):
        clean, _ = kind.inputs(kind.example(1))
        try:
            output = _denoise(kind.network, clean, torch.zeros(1, dtype=torch.long))
        except Exception as error:  # whatever a block does with a tensor that it was not made for
            raise UserError(f"{problem}: {first_line(error)}") from error
    if output.shape != clean.shape:
        raise UserError(f"{problem}: it maps {tuple(clean.shape)} to {tuple(output.shape)}")


@torch.no_grad()
def _check_finite(kind: Unconditional) -> None:
    """Some settings divide by zero, and weights may be damaged; tried at the first and the last timestep on images of
    the fewest pixels that leave two a side at the lowest resolution."""
    network, last = kind.network.eval(), kind.noise_scheduler.config.num_train_timesteps - 1
    channels, resolution = kind.image_format
    side = min(resolution, 2 ** len(network.config.block_out_channels))
    try:
        output = _denoise(network, torch.zeros(2, channels, side, side), torch.tensor([0, last]))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return  # the memory plan has better advice
    finally:
        network.train()
    if not output.isfinite().all():
        raise UserError(
            f"model: the network's prediction is not finite at timestep 0 or {last}, before any training; expected "
            "finite weights, and settings that do not divide by zero (freq_shift, mid_block_scale_factor, norm_eps)"
        )


def _denoise(network: UNet2DModel, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The prediction of a network whose classes, if it has an embedding of them, are not named yet: for the first."""
    labelled = network.class_embedding is not None
    return network(images, timesteps, torch.zeros_like(timesteps) if labelled else None).sample
