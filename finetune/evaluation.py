"""What the network can do: validation loss without sampling noise, and pictures from noise that stays the same.

Work is cut into chunks of one fixed size and dealt over the processes, so that every image goes through the same shapes
and comes out the same to the last bit, whatever the number of processes and the micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler

from finetune.config import Config
from finetune.model import noised_and_conditioning
from finetune.objective import loss_per_image, predicted_images
from finetune.randomness import noise

CHUNK = 8


class Interrupted(Exception):  # noqa: N818 - not an error: a process was asked to stop
    """Raised on all processes at the next step of an evaluation after any of them was asked to stop."""


class StopCheck:
    """Asks between two steps of an evaluation whether any process was told to stop; one tiny reduction each."""

    def __init__(self, accelerator: Accelerator, requested: Callable[[], bool]):
        self.accelerator, self.requested = accelerator, requested

    def __call__(self) -> None:
        flag = torch.tensor(float(self.requested()), device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item() > 0:
            raise Interrupted


class Prediction(NamedTuple):
    """A forward pass: what went in, and what came out, each (b, C, H, W) but the timesteps (b,)."""

    clean: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    noisy: torch.Tensor
    output: torch.Tensor


class Validation:
    """Held-out images with noise and timesteps fixed for the whole run, the timesteps spread evenly over the range."""

    def __init__(self, images: Sequence[np.ndarray], config: Config, noise_scheduler: DDPMScheduler):
        """Draw i of `validation.images` shows held-out image i mod n at timestep floor(T (i + 1/2) / count).

        Args:
            images: the held-out images, each uint8 (H, W, C) at the training resolution.
        """
        self.images, self.seed, self.noise_scheduler = images, config.seed, noise_scheduler
        self.snr_gamma = config.training.snr_gamma
        self.timesteps = self._spread(config.validation.images)

    @torch.no_grad()
    def losses(self, unet: torch.nn.Module, accelerator: Accelerator, check: Callable[[], None]) -> np.ndarray:
        """Loss of each draw, float64 (count,), the same on all processes. Called by all of them."""
        losses = torch.zeros(len(self.timesteps), dtype=torch.get_default_dtype(), device=accelerator.device)
        with _evaluating(unet):
            for chunk in _rounds(len(self.timesteps), accelerator):
                check()
                if chunk is None:
                    continue
                shown = [draw % len(self.images) for draw in chunk]
                made = self._predict(unet, accelerator.device, shown, chunk, self.timesteps[chunk.start : chunk.stop])
                losses[chunk.start : chunk.stop] = loss_per_image(
                    self.noise_scheduler, made.output, made.clean, made.noise, made.timesteps, self.snr_gamma
                )
        return accelerator.reduce(losses, "sum").double().cpu().numpy()  # each is 0 on all processes but one

    @torch.no_grad()
    def denoise(self, unet: torch.nn.Module, device: torch.device) -> np.ndarray:
        """The first held-out image under ever more noise, and what the network makes of each: uint8 (2 n, H, W, C).

        First the n noisy ones, then the n clean ones that it predicts from them, each in one step.
        """
        with _evaluating(unet):
            made = self._predict(unet, device, [0] * CHUNK, range(CHUNK), self._spread(CHUNK))
        clean = predicted_images(self.noise_scheduler, made.output, made.noisy, made.timesteps)
        return _as_pixels(torch.cat([made.noisy, clean]))

    def _spread(self, count: int) -> np.ndarray:
        steps = self.noise_scheduler.config.num_train_timesteps
        return ((np.arange(count) + 0.5) * steps / count).astype(np.int64)

    def _predict(
        self, unet: torch.nn.Module, device: torch.device, shown: list[int], draws: range, timesteps: np.ndarray
    ) -> Prediction:
        pixels = torch.from_numpy(np.stack([self.images[index] for index in shown])).permute(0, 3, 1, 2)
        drawn = torch.stack([noise(self.seed, 0, draw, pixels.shape[1:], "validation") for draw in draws])
        batch = {"images": pixels, "noise": drawn, "timesteps": torch.from_numpy(timesteps)}
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        clean, conditioning = noised_and_conditioning(batch)
        noisy = self.noise_scheduler.add_noise(clean, batch["noise"], batch["timesteps"])
        output = unet(noisy, batch["timesteps"], **conditioning).sample
        return Prediction(clean, batch["noise"], batch["timesteps"], noisy, output)


@torch.no_grad()
def sample(
    unet: torch.nn.Module,
    noise_scheduler: DDPMScheduler,
    accelerator: Accelerator,
    check: Callable[[], None],
    seed: int,
    count: int,
    inference_steps: int,
) -> np.ndarray:
    """`count` images by DDIM from starting noise that the seed alone decides, uint8 (count, H, W, C).

    Called by all processes, each of which draws its share; all get the result.
    """
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    images = torch.zeros(count, *shape, device=accelerator.device)
    ddim = DDIMScheduler.from_config(noise_scheduler.config)
    ddim.set_timesteps(inference_steps)
    with _evaluating(unet):
        for chunk in _rounds(count, accelerator):
            if chunk is not None:
                x = torch.stack([noise(seed, 0, index, shape, "samples") for index in chunk]).to(accelerator.device)
            for timestep in ddim.timesteps:
                check()
                if chunk is not None:
                    x = ddim.step(unet(x, timestep).sample, timestep, x).prev_sample
            if chunk is not None:
                images[chunk.start : chunk.stop] = x
    return _as_pixels(accelerator.reduce(images, "sum"))  # each is 0 on all processes but one


def _rounds(count: int, accelerator: Accelerator) -> Iterator[range | None]:
    """This process's chunks of 0 .. count-1, padded with None so that all processes make the same number of rounds."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    chunks += [None] * (-len(chunks) % accelerator.num_processes)
    return iter(chunks[accelerator.process_index :: accelerator.num_processes])


@contextmanager
def _evaluating(unet: torch.nn.Module) -> Iterator[None]:
    unet.eval()
    try:
        yield
    finally:
        unet.train()


def _as_pixels(images: torch.Tensor) -> np.ndarray:
    """From (n, C, H, W) in [-1, 1] to uint8 (n, H, W, C)."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
