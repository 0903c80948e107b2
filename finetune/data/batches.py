"""The micro-batches that the loop is fed. What one holds depends on its slots alone, not on who reads it."""

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from finetune.core import randomness
from finetune.data.order import Indices, Slot
from finetune.data.pixels import Images

Dropped = npt.NDArray[np.bool_]


class Batches(Dataset[dict[str, torch.Tensor]]):
    """Makes a micro-batch of its slots. Each value is a function of (seed, epoch, position) and the image.

    For a class-conditional model, `labels` has the class of each, int64 (n,); an image's is dropped
    with the probability `condition_dropout`. `noise_offset` is the strength of noise that a channel has in all of its
    pixels (Guttenberg 2023, "Diffusion with Offset Noise").
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
        noise_offset: float = 0.0,
    ):
        self.images, self.seed = images, seed
        self.num_train_timesteps, self.timestep_sampling = num_train_timesteps, timestep_sampling
        self.crop, self.random_flip = crop, random_flip
        self.labels, self.condition_dropout, self.noise_offset = labels, condition_dropout, noise_offset

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        """A batch of b slots of one epoch, whose images have one shape.

        Returns:
            noise: standard normal, in the default dtype, of the shape of what is noised: (b, C, H, W).
            timesteps: int64 (b,), in 0 .. num_train_timesteps - 1.
            weights: default dtype (b,), 0 for padding.
            And what `content` and `conditions` return.
        """
        shape = self.shape(slots[0].image)
        noise = torch.empty(len(slots), *shape)
        for place, slot in enumerate(slots):
            noise[place] = randomness.noise(self.seed, slot.epoch, slot.position, shape)
            if self.noise_offset:
                channels = (shape[0], 1, 1)
                offset = randomness.noise(self.seed, slot.epoch, slot.position, channels, "noise offset")
                noise[place] += self.noise_offset * offset
        epoch, positions = slots[0].epoch, [slot.position for slot in slots]
        return {
            **self.content(slots),
            "noise": noise,
            "timesteps": torch.from_numpy(self.timesteps(epoch, positions)),
            "weights": torch.tensor([slot.weight for slot in slots]),
            **(self.conditions(slots, self.dropped(epoch, positions)) if self.conditional else {}),
        }

    def timesteps(self, epoch: int, positions: randomness.Positions) -> npt.NDArray[np.int64]:
        """The timesteps that the images at n positions of an epoch are trained at, (n,)."""
        return randomness.timesteps(self.seed, epoch, positions, self.num_train_timesteps, self.timestep_sampling)

    def dropped(self, epoch: int, positions: randomness.Positions) -> Dropped:
        """Which of the images at n positions of an epoch are trained without their condition, (n,)."""
        return randomness.conditions_dropped(self.seed, epoch, positions, self.condition_dropout)

    def shown(self, images: list[int], dropped: bool) -> dict[str, torch.Tensor]:
        """Images without augmentation, with their conditions or without: a batch but for noise, timesteps, weights."""
        pixels = self.centers(images)
        if self.labels is None:
            return {"images": pixels}
        labels = torch.from_numpy(self.labels[images])
        return {"images": pixels, "labels": labels, "dropped": torch.full((len(images),), dropped)}

    def centers(self, images: list[int]) -> torch.Tensor:
        """The centres of b images, uint8 (b, C, H, W)."""
        return torch.from_numpy(np.stack([self.images[index] for index in images])).permute(0, 3, 1, 2)

    def shape(self, image: int) -> tuple[int, ...]:
        """What is noised of an image, (C, H, W)."""
        return self.images.channels, *self.images.shape(image)

    @property
    def conditional(self) -> bool:
        """Whether a batch has conditions, which may be dropped."""
        return self.labels is not None

    def content(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        """What is noised: images, uint8 (b, C, H, W), contiguous."""
        return {"images": self.read_images(slots)}

    def conditions(self, slots: list[Slot], dropped: Dropped) -> dict[str, torch.Tensor]:
        """What a conditional network is told: labels, int64 (b,), and which of them are dropped, bool (b,)."""
        assert self.labels is not None
        labels = self.labels[[slot.image for slot in slots]]
        return {"labels": torch.from_numpy(labels), "dropped": torch.from_numpy(dropped)}

    def flipped(self, slot: Slot) -> bool:
        """Whether the image of a slot is mirrored."""
        return self.random_flip and bool(randomness.uniform(self.seed, "flip", slot.epoch, slot.position, 1)[0] < 0.5)

    def corner(self, slot: Slot) -> tuple[int, int]:
        """Top and left of the random crop of a slot, in the picture that is scaled to cover its shape."""
        stored, (height, width) = self.images.pixels(slot.image).shape, self.images.shape(slot.image)
        draws = randomness.uniform(self.seed, "crop", slot.epoch, slot.position, 2)
        return int(draws[0] * (stored[0] - height + 1)), int(draws[1] * (stored[1] - width + 1))

    def read_images(self, slots: list[Slot]) -> torch.Tensor:
        """The images of b slots, cropped and flipped: uint8 (b, C, H, W)."""
        images = torch.empty(len(slots), self.images.channels, *self.images.shape(slots[0].image), dtype=torch.uint8)
        channels_last = images.numpy().transpose(0, 2, 3, 1)  # a view: pixels go straight to their place
        for place, slot in enumerate(slots):
            channels_last[place] = self._augmented(slot)
        return images

    def _augmented(self, slot: Slot) -> np.ndarray:
        """The image of a slot, cropped and flipped as its key says: uint8 (H, W, C), a view."""
        if self.crop == "random":
            pixels, (height, width) = self.images.pixels(slot.image), self.images.shape(slot.image)
            top, left = self.corner(slot)
            pixels = pixels[top : top + height, left : left + width]
        else:
            pixels = self.images[slot.image]
        if self.flipped(slot):
            pixels = pixels[:, ::-1]
        return pixels
