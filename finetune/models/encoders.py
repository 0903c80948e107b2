"""The frozen encoders of a Stable Diffusion pipeline: its VAE and its text encoders, in float32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ModelMixin

from finetune.core.kind import Fields
from finetune.core.shapes import Shape
from finetune.models.components import Folder, without_warnings

_PIXELS = 2**18  # encoded at once: one image of 512 pixels a side, 64 of 64
_TEXTS = 16  # encoded at once


class PipelineEncoders:
    """What a Stable Diffusion pipeline encodes images and captions with; see `core.kind.Encoders`."""

    def __init__(self, folder: Folder, crop_encoder: ModelMixin | None = None):
        """
        Args:
            crop_encoder: the VAE on the meta device, where random crops are encoded while updates run.
        """
        self.folder, self.sized, self.crop_encoder = folder, folder.sized, crop_encoder
        vae = folder.config("vae")
        self.factor = 2 ** (len(vae["block_out_channels"]) - 1)  # pixels a side of one latent pixel
        self.channels, self.latent_channels = vae["in_channels"], vae["latent_channels"]
        self._scale = float(vae.get("scaling_factor", 0.18215))
        # Of a channel, where the VAE names them; copied to a device once, not for each micro-batch.
        named = vae.get("latents_mean"), vae.get("latents_std")
        self._statistics = None if None in named else torch.tensor(named).view(2, 1, -1, 1, 1)
        self._copies: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self.text_chunk = _TEXTS
        self.tokenizers = [folder.load_tokenizer(part) for part in folder.tokenizers]
        configs = [folder.config(part) for part in folder.text_encoders]
        width = sum(config["hidden_size"] for config in configs)
        self.text_fields: Fields = {"text": (self.tokenizers[0].model_max_length, width)}
        if self.sized:
            self.text_fields["pooled"] = (configs[-1]["projection_dim"],)
        self.image_key = folder.digest(["vae"])
        # SDXL's pipelines take zeros unless they say otherwise, the others the empty text.
        self.no_text = None if folder.zeros_for_no_prompt else ""
        self.text_key = folder.digest([*folder.text_encoders, *folder.tokenizers])
        self._vae: Any = None
        self._prompter: Any = None

    def latents(self, shape: Shape) -> tuple[int, int, int]:
        """(c, h, w) of the latents of an image of a shape, whose sides `factor` divides."""
        return self.latent_channels, shape.height // self.factor, shape.width // self.factor

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the UNet sees them."""
        if self._statistics is None:
            return latents * self._scale
        mean, std = self._statistics_like(latents)
        return (latents - mean) / std * self._scale

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE encodes and decodes them, of what the UNet sees."""
        if self._statistics is None:
            return latents / self._scale
        mean, std = self._statistics_like(latents)
        return latents / self._scale * std + mean

    def _statistics_like(self, latents: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation, (2, 1, c, 1, 1), where these latents are."""
        assert self._statistics is not None
        where = latents.device, latents.dtype
        if where not in self._copies:
            self._copies[where] = self._statistics.to(latents)
        return self._copies[where]

    def image_fields(self, shape: Shape) -> Fields:
        """Mean and standard deviation of an image's posterior."""
        return dict.fromkeys(("mean", "std"), self.latents(shape))

    def image_chunk(self, shape: Shape) -> int:
        """How many images of a shape are encoded at once: about as many pixels of each shape."""
        return max(_PIXELS // shape.area, 1)

    def check(self) -> None:
        """Load every encoder once: a pipeline that cannot draw its samples should not begin to train.

        Raises:
            UserError: if one cannot be loaded safely.
        """
        for part in ("vae", *self.folder.text_encoders):
            self.folder.load(part)

    def images(self, pixels: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Mean and standard deviation of the posteriors of uint8 (b, C, H, W), each (b, c, h, w), not scaled."""
        return {name: moment.cpu() for name, moment in self.encode(pixels.to(device)).items()}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same on the pixels' device, `image_chunk` of them at a time, so that more take no more memory."""
        vae: Any = self.crop_encoder if pixels.is_meta else self._loaded_vae(pixels.device)
        parts = pixels.split(self.image_chunk(Shape(*pixels.shape[2:])))
        with _in_float32(pixels.device):
            posteriors = [vae.encode(part.float() / 127.5 - 1.0).latent_dist for part in parts]
        return {name: torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "std")}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Images of latents that are not scaled, (b, C, H, W): one at a time, which takes the least memory."""
        vae = self._loaded_vae(device)
        with _in_float32(device):
            images = [vae.decode(latent[None].float()).sample for latent in latents]
        return torch.cat(images)

    def _loaded_vae(self, device: torch.device) -> Any:
        if self._vae is None:
            self._vae = self.folder.load("vae").to(device)
        return self._vae

    @torch.no_grad()
    def texts(self, texts: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """What the pipeline itself makes of prompts: `text` (n, tokens, width), and SDXL's `pooled` (n, width)."""
        if self._prompter is None:
            parts = {part: self.folder.load(part) for part in self.folder.text_encoders}
            parts |= dict(zip(self.folder.tokenizers, self.tokenizers, strict=True))
            self._prompter = self.folder.pipeline(**parts).to(device)
        with _in_float32(device), without_warnings():
            embeddings = self._prompter.encode_prompt(
                [*texts], device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        encoded = {"text": embeddings[0].cpu()}
        return encoded | ({"pooled": embeddings[2].cpu()} if self.sized else {})

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that have more tokens than a text encoder reads."""
        most = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        with without_warnings():
            lengths = [[*map(len, tokenizer([*texts]).input_ids)] for tokenizer in self.tokenizers] if texts else []
        longest = [[length > limit for length in column] for column, limit in zip(lengths, most, strict=False)]
        return [text for text, *over in zip(texts, *longest, strict=True) if any(over)] if texts else []

    def free(self) -> None:
        """Release the encoders' memory; a VAE that encodes random crops stays."""
        self._prompter = None
        if self.crop_encoder is None:
            self._vae = None


@contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    """Without the autocast of mixed precision: an entry of the cache does not depend on the launch."""
    autocast = torch.amp.is_autocast_available(device.type)  # not on the meta device
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        yield
