"""What the network can do: validation loss without sampling noise, and sample grids from fixed starting noise.

Work is cut into chunks of one fixed size and dealt over the processes, so that every image goes through the same shapes
and comes out the same to the last bit, whatever the number of processes and the micro-batch.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler

from finetune.config import Config
from finetune.model import noised_and_conditioning
from finetune.objective import loss_per_image
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


def _rounds(count: int, accelerator: Accelerator) -> Iterator[range | None]:
    """This process's chunks of 0 .. count-1, padded with None so that all processes make the same number of rounds."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    chunks += [None] * (-len(chunks) % accelerator.num_processes)
    return iter(chunks[accelerator.process_index :: accelerator.num_processes])


class Validation:
    """Held-out images with noise and timesteps fixed for the whole run, the timesteps spread evenly over the range."""

    def __init__(self, images: Sequence[np.ndarray], config: Config, noise_scheduler: DDPMScheduler):
        """Draw i of `validation.images` shows held-out image i mod n at timestep floor(T (i + 1/2) / count).

        Args:
            images: the held-out images, each uint8 (H, W, C) at the training resolution.
        """
        self.images, self.seed, self.noise_scheduler = images, config.seed, noise_scheduler
        self.snr_gamma, count = config.training.snr_gamma, config.validation.images
        self.timesteps = ((np.arange(count) + 0.5) * noise_scheduler.config.num_train_timesteps / count).astype(
            np.int64
        )

    @torch.no_grad()
    def losses(self, unet: torch.nn.Module, accelerator: Accelerator, check: Callable[[], None]) -> np.ndarray:
        """Loss of each draw, float64 (count,), the same on all processes. Called by all of them."""
        losses = torch.zeros(len(self.timesteps), dtype=torch.get_default_dtype(), device=accelerator.device)
        unet.eval()
        for chunk in _rounds(len(self.timesteps), accelerator):
            check()
            if chunk is None:
                continue
            batch = {name: tensor.to(accelerator.device) for name, tensor in self._batch(chunk).items()}
            clean, conditioning = noised_and_conditioning(batch)
            noisy = self.noise_scheduler.add_noise(clean, batch["noise"], batch["timesteps"])
            prediction = unet(noisy, batch["timesteps"], **conditioning).sample
            losses[chunk.start : chunk.stop] = loss_per_image(
                self.noise_scheduler, prediction, clean, batch["noise"], batch["timesteps"], self.snr_gamma
            )
        unet.train()
        return accelerator.reduce(losses, "sum").double().cpu().numpy()  # each is 0 on all processes but one

    def _batch(self, draws: range) -> dict[str, torch.Tensor]:
        pixels = [self.images[draw % len(self.images)] for draw in draws]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        return {
            "images": images,
            "noise": torch.stack([noise(self.seed, 0, draw, images.shape[1:], "validation") for draw in draws]),
            "timesteps": torch.from_numpy(self.timesteps[draws.start : draws.stop]),
        }


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
    config = unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    images = torch.zeros(count, *shape, device=accelerator.device)
    ddim = DDIMScheduler.from_config(noise_scheduler.config)
    ddim.set_timesteps(inference_steps)
    unet.eval()
    for chunk in _rounds(count, accelerator):
        if chunk is not None:
            x = torch.stack([noise(seed, 0, index, shape, "samples") for index in chunk]).to(accelerator.device)
        for timestep in ddim.timesteps:
            check()
            if chunk is not None:
                x = ddim.step(unet(x, timestep).sample, timestep, x).prev_sample
        if chunk is not None:
            images[chunk.start : chunk.stop] = x
    unet.train()
    images = accelerator.reduce(images, "sum")
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
