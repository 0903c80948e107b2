"""Validation loss with fixed noise and timesteps, and what the network predicts at each noise level."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from finetune.core.groups import summed
from finetune.core.kind import Kind
from finetune.core.randomness import noise
from finetune.data.batches import Batches
from finetune.data.pixels import Pixels
from finetune.evaluation.passes import Prediction, as_pixels, evaluating, predict_noised
from finetune.evaluation.rounds import CHUNK, rounds
from finetune.training.objective import loss_per_image, predicted_images
from finetune.training.trial_pass import pass_idly


class Validation:
    """Held-out images with noise and timesteps fixed for the whole run, the timesteps spread evenly over the range."""

    def __init__(self, examples: Batches, count: int, seed: int, kind: Kind, snr_gamma: float | None):
        """Draw i of `count` shows held-out image i mod n at timestep floor(T (i + 1/2) / count).

        Args:
            examples: of the held-out images, shown without augmentation; a latent is its posterior's mean.
        """
        self.examples, self.seed, self.kind, self.snr_gamma = examples, seed, kind, snr_gamma
        self.timesteps = self._spread(count)
        self._shapes = [examples.shape(draw % len(examples)) for draw in range(count)]  # a chunk has one

    @torch.no_grad()
    def losses(
        self, accelerator: Accelerator, check: Callable[[], None], dropped: bool = False
    ) -> npt.NDArray[np.float64]:
        """Loss of each draw, float64 (count,), the same on all processes. Called by all of them.

        Args:
            check: called between two chunks; raises Interrupted to end here.
            dropped: without the images' conditions.
        """
        losses = torch.zeros(len(self.timesteps), dtype=torch.get_default_dtype(), device=accelerator.device)
        with evaluating(self.kind.network):
            for chunk in rounds(len(self.timesteps), accelerator, self._shapes):
                check()
                if chunk is None:
                    pass_idly(self.kind)
                    continue
                shown = [draw % len(self.examples) for draw in chunk]
                made = self._predict(accelerator.device, shown, chunk, self.timesteps[chunk], dropped)
                losses[chunk] = loss_per_image(
                    self.kind.noise_scheduler, made.output, made.clean, made.noise, made.timesteps, self.snr_gamma
                )
        return summed(losses).double().numpy()  # each is 0 on all processes but one

    @torch.no_grad()
    def denoise(self, device: torch.device) -> Pixels:
        """One-step predictions of the first held-out image at 8 noise levels: uint8 (2 n, H, W, C).

        First the n noisy images, then the n clean ones that the network predicts from them.
        """
        with evaluating(self.kind.network):
            made = self._predict(device, [0] * CHUNK, range(CHUNK), self._spread(CHUNK))
        clean = predicted_images(self.kind.noise_scheduler, made.output, made.noisy, made.timesteps)
        return as_pixels(self.kind.images(torch.cat([made.noisy, clean])))

    @property
    def noise_levels(self) -> list[str]:
        """The timesteps of `denoise`, as it shows them from left to right."""
        return [str(timestep) for timestep in self._spread(CHUNK)]

    def _spread(self, count: int) -> npt.NDArray[np.int64]:
        steps = self.kind.noise_scheduler.config.num_train_timesteps
        return ((np.arange(count) + 0.5) * steps / count).astype(np.int64)

    def _predict(
        self,
        device: torch.device,
        shown: list[int],
        draws: Sequence[int],
        timesteps: npt.NDArray[np.int64],
        dropped: bool = False,
    ) -> Prediction:
        shape = self.examples.shape(shown[0])
        drawn = torch.stack([noise(self.seed, 0, draw, shape, "validation") for draw in draws])
        batch = {"noise": drawn, "timesteps": torch.from_numpy(timesteps)}
        return predict_noised(self.kind, batch | self.examples.shown(shown, dropped), device)
