"""The micro-batches that the loop is fed. What one holds depends on its slots alone, not on who reads it."""

import numpy as np
import torch
from torch.utils.data import Dataset

from finetune.core import randomness
from finetune.data.order import Indices, Slot
from finetune.data.pixels import Images


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Makes a micro-batch of its slots. Each value is a function of (seed, epoch, position) and the image.

    For a model that is told the class of an image, `labels` has the class of each, int64 (n,); an image's is dropped
    with the probability `condition_dropout`.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        num_train_timesteps: int,
        timestep_sampling: str,
        crop: str,
        random_flip: bool,
        labels: Indices | None = None,
        condition_dropout: float = 0.0,
    ):
        self.images, self.seed, self.resolution = images, seed, images.resolution
        self.num_train_timesteps, self.timestep_sampling = num_train_timesteps, timestep_sampling
        self.crop, self.random_flip = crop, random_flip
        self.labels, self.condition_dropout = labels, condition_dropout

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        """A batch of b slots.

        Returns:
            images: uint8 (b, C, resolution, resolution), contiguous.
            noise: standard normal, of the same shape, in the default dtype.
            timesteps: int64 (b,), in 0 .. num_train_timesteps - 1.
            weights: default dtype (b,), 0 for padding.
            labels: int64 (b,), and dropped: bool (b,), where there are labels.
        """
        shape = (self.images.channels, self.resolution, self.resolution)
        noise = torch.empty(len(slots), *shape)
        for place, slot in enumerate(slots):
            noise[place] = randomness.noise(self.seed, slot.epoch, slot.position, shape)
        timesteps = [
            randomness.timestep(self.seed, slot.epoch, slot.position, self.num_train_timesteps, self.timestep_sampling)
            for slot in slots
        ]
        return {
            "images": self.read_images(slots),
            "noise": noise,
            "timesteps": torch.tensor(timesteps),
            "weights": torch.tensor([slot.weight for slot in slots]),
            **self._conditions(slots),
        }

    def _conditions(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        if self.labels is None:
            return {}
        dropped = [
            randomness.condition_dropped(self.seed, slot.epoch, slot.position, self.condition_dropout) for slot in slots
        ]
        labels = self.labels[[slot.image for slot in slots]]
        return {"labels": torch.from_numpy(labels), "dropped": torch.tensor(dropped)}

    def read_images(self, slots: list[Slot]) -> torch.Tensor:
        """The images of b slots, cropped and flipped: uint8 (b, C, resolution, resolution)."""
        images = torch.empty(len(slots), self.images.channels, self.resolution, self.resolution, dtype=torch.uint8)
        channels_last = images.numpy().transpose(0, 2, 3, 1)  # a view: pixels go straight to their place
        for place, slot in enumerate(slots):
            channels_last[place] = self._augmented(slot)
        return images

    def _augmented(self, slot: Slot) -> np.ndarray:
        """The image of a slot, cropped and flipped as its key says: uint8 (resolution, resolution, C), a view."""
        if self.crop == "random":
            pixels, side = self.images.pixels(slot.image), self.resolution
            draws = randomness.uniform(self.seed, "crop", slot.epoch, slot.position, 2)
            top, left = (int(u * (n - side + 1)) for u, n in zip(draws, pixels.shape, strict=False))
            pixels = pixels[top : top + side, left : left + side]
        else:
            pixels = self.images[slot.image]
        if self.random_flip and randomness.uniform(self.seed, "flip", slot.epoch, slot.position, 1)[0] < 0.5:
            pixels = pixels[:, ::-1]
        return pixels
