"""Distances between samples and held-out images in the features of an image model: Fréchet and kernel distance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoModel

from finetune.config.outputs import QualityConfig
from finetune.core.errors import UserError, first_line
from finetune.core.groups import summed
from finetune.core.shapes import Shape
from finetune.data.pixels import Pixels
from finetune.evaluation.rounds import rounds


class Features:
    """Features of images by any image model of transformers: a ViT, DINOv2, ResNet, or CLIP's image tower."""

    def __init__(self, name: str):
        """Load a model and its image processor from a folder or the hub.

        Raises:
            UserError: if `name` is neither, or not a model of images.
        """
        try:
            self.processor = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
            self.model = AutoModel.from_pretrained(name).eval()
            vision = getattr(self.model.config, "vision_config", self.model.config)
            self.channels: int = getattr(vision, "num_channels", 3)
            self.width = self.of(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]
        except Exception as error:  # transformers, the hub's client and safetensors each raise their own
            raise UserError(
                f"validation.quality.features: {name!r} cannot be loaded ({first_line(error)}); expected a folder or a "
                "hub id of an image model with its preprocessor_config.json, such as facebook/dinov2-small"
            ) from error

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The model on a device for the block, and out of its memory while updates run."""
        self.model.to(device)
        try:
            yield
        finally:
            self.model.to("cpu")

    @torch.no_grad()
    def of(self, images: Pixels) -> torch.Tensor:
        """Pooled features of uint8 (n, H, W, C) images, float32 (n, width), on the model's device.

        Grey images are repeated for a model of colour, the channels of colour ones averaged for a model of grey, and
        alpha is left out.
        """
        images = images[..., :3]
        if self.channels == 1:
            images = images.mean(-1, keepdims=True).round().astype(np.uint8)
        elif images.shape[-1] == 1:
            images = images.repeat(3, axis=-1)
        inputs = self.processor(list(images), return_tensors="pt", input_data_format="channels_last")
        pixels = inputs["pixel_values"].to(self.model.device)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
        else:
            output = self.model(pixel_values=pixels)
        pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
        if pooled is None:  # a model without a pooling layer: the mean over its tokens
            pooled = output.last_hidden_state.mean(1)
        return pooled.flatten(1).float()


class Quality:
    """Measures samples against held-out images; the same numbers whatever the number of processes."""

    def __init__(self, config: QualityConfig, images: Sequence[Pixels], names: Sequence[str | None]):
        """Compare `config.images` samples with as many held-out images, or with all if there are fewer.

        Args:
            images: held-out images, each uint8 (H, W, C) of a shape of its own.
            names: the condition of each; the samples are drawn for the same ones, in the same shapes.

        Raises:
            UserError: if there are fewer than two images, which have no covariance, or if the image model cannot
                be loaded.
        """
        if len(images) < 2:
            raise UserError(
                f"validation.quality: found {len(images)} held-out image; expected at least 2, to estimate a "
                "covariance: hold out more with data.validation_fraction or data.validation_split"
            )
        self.features = Features(config.features)
        self.images = [images[index] for index in range(min(config.images, len(images)))]
        self.names = [names[index % len(names)] for index in range(config.images)]
        shapes = [Shape(*image.shape[:2]) for image in self.images]
        self.shapes = [shapes[index % len(shapes)] for index in range(config.images)]
        self._real: torch.Tensor | None = None

    def distances(
        self, samples: Sequence[Pixels], accelerator: Accelerator, check: Callable[[], None]
    ) -> dict[str, float]:
        """`frechet_distance` and `kernel_distance`, each lower for better samples. Called by all processes.

        Fréchet distance: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6; its bias falls
        with the number of images. Kernel distance: Binkowski et al. 2018, "Demystifying MMD GANs", the
        unbiased estimate with the polynomial kernel of degree 3; it varies around 0 for perfect samples.

        Args:
            samples: each uint8 (H, W, C), the same on all processes.
            check: called between two chunks; raises Interrupted to end here.
        """
        if self._real is None:
            self._real = self._shared(self.images, accelerator, check)
        return feature_distances(self._real, self._shared(samples, accelerator, check))

    def _shared(self, images: Sequence[Pixels], accelerator: Accelerator, check: Callable[[], None]) -> torch.Tensor:
        """Features of all images, float32 (n, d), each computed by one process, in chunks of one shape."""
        found = torch.zeros(len(images), self.features.width, device=accelerator.device)
        with self.features.on(accelerator.device):
            for chunk in rounds(len(images), accelerator, [image.shape for image in images]):
                check()
                if chunk is not None:
                    found[chunk] = self.features.of(np.stack([images[index] for index in chunk]))
        return summed(found)  # each row is 0 on all processes but one


def feature_distances(real: torch.Tensor, fake: torch.Tensor) -> dict[str, float]:
    """Fréchet and kernel distance of two sets of features, (n, d) and (m, d), by torchmetrics.

    Sample j was drawn for the condition of image j mod n. The kernel distance leaves out pairs of one condition, as
    Gretton et al. 2012, "A Kernel Two-Sample Test", equation 4, do for two sets in pairs. Such pairs are alike, and
    within a set they are left out anyway; torchmetrics' own distance counts them between the sets, and puts 200 perfect
    samples of the digits by class at -0.5.
    """
    # Imported here: a second of imports that most runs do not need.
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_kernel

    real, fake = real.double(), fake.double()
    # Every process has all features: synchronised by torchmetrics, each would count once a process.
    frechet = FrechetInceptionDistance(feature=_AsGiven(real.shape[1]), sync_on_compute=False)
    frechet.set_dtype(torch.float64)
    frechet.update(real, real=True)
    frechet.update(fake, real=False)

    def likeness(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        places = torch.arange(len(ones)), torch.arange(len(others))
        apart = (places[0][:, None] - places[1]) % len(real) != 0
        return poly_kernel(ones, others)[apart.to(ones.device)].mean()

    kernel = likeness(real, real) + likeness(fake, fake) - 2 * likeness(real, fake)
    return {"frechet_distance": float(frechet.compute()), "kernel_distance": float(kernel)}


class _AsGiven(torch.nn.Module):
    """In place of torchmetrics' own network: the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
