"""The micro-batches of a latent model: made of encodings, with the same keys and streams as those of pixels."""

from collections.abc import Sequence

import torch

from finetune.config.schema import Config
from finetune.core import randomness
from finetune.core.kind import Kind
from finetune.core.shapes import covering
from finetune.data.batches import Batches, Dropped
from finetune.data.encodings import Encodings, Orientations, RequiredEncodings, image_key
from finetune.data.order import Slot
from finetune.data.pixels import Images


class EncodedBatches(Batches):
    """Makes a micro-batch of its slots. A latent is drawn from its image's posterior, as a stream of its own."""

    conditional, cut = True, "center"

    def __init__(
        self,
        images: Images,
        encodings: Encodings,
        seed: int,
        num_train_timesteps: int,
        timestep_sampling: str,
        random_flip: bool,
        condition_dropout: float,
        noise_offset: float = 0.0,
    ):
        super().__init__(
            images,
            seed,
            num_train_timesteps,
            timestep_sampling,
            self.cut,
            random_flip,
            condition_dropout=condition_dropout,
            noise_offset=noise_offset,
        )
        self.posteriors, self.texts, self.sized = encodings.posteriors, encodings.texts, encodings.sized
        assert images.captions is not None
        self.captions = images.captions

    def shape(self, image: int) -> tuple[int, ...]:
        return self.posteriors[self.images.shape(image)].fields["mean"]

    def content(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        """What is noised: latents, not scaled, (b, c, h, w) in the default dtype."""
        shape = self.shape(slots[0].image)
        latents = torch.empty(len(slots), *shape)
        for place, slot in enumerate(slots):
            posterior = self._posterior(slot.image, self.flipped(slot))
            latents[place] = posterior["mean"] + posterior["std"] * self.draw(slot)
        return {"latents": latents}

    def draw(self, slot: Slot) -> torch.Tensor:
        """What the latent of a slot is drawn with, standard normal (c, h, w)."""
        return randomness.noise(self.seed, slot.epoch, slot.position, self.shape(slot.image), "posterior")

    def conditions(self, slots: list[Slot], dropped: Dropped) -> dict[str, torch.Tensor]:
        """What the network is told: a caption of each image, or none where it is dropped, and sizes if it reads them.

        Both as the network takes them: embeddings, and SDXL's `time_ids`.
        """
        captions = [self.captions.texts[self.captions.drawn(self.seed, slot)] for slot in slots]
        told = [None if without else caption for caption, without in zip(captions, dropped, strict=True)]
        return self.texts.embed(told) | self._time_ids([self.size_of(slot) for slot in slots])

    def shown(self, images: list[int], dropped: bool) -> dict[str, torch.Tensor]:
        """Means of the posteriors, with the first caption of each image or without."""
        told = self.texts.embed([None if dropped else self.captions.texts[self.captions.first(i)] for i in images])
        told |= self._time_ids([size_and_crop(self.images, index, False) for index in images])
        return {**self.means(images), **told}

    def means(self, images: list[int]) -> dict[str, torch.Tensor]:
        """What is noised of images that are shown: latents, (b, c, h, w)."""
        means = torch.stack([self._posterior(index, False)["mean"] for index in images])
        return {"latents": means.to(torch.get_default_dtype())}

    def size_of(self, slot: Slot) -> list[int]:
        """SDXL's size and crop of a slot's image."""
        return size_and_crop(self.images, slot.image, self.flipped(slot))

    def _posterior(self, image: int, flipped: bool) -> dict[str, torch.Tensor]:
        return self.posteriors[self.images.shape(image)].read(image_key(self.images, image, flipped))

    def _time_ids(self, sizes: list[list[int]]) -> dict[str, torch.Tensor]:
        """SDXL's size and crop of each image; none for models that do not read them."""
        return {"time_ids": torch.tensor(sizes)} if self.sized else {}


class CroppedBatches(EncodedBatches):
    """Batches of random crops, which no cache can hold: pixels, and the noise to draw their latents with."""

    cut = "random"

    def content(self, slots: list[Slot]) -> dict[str, torch.Tensor]:
        """What the model makes latents of: images, uint8 (b, C, H, W), and the draws of their posteriors."""
        return {"images": self.read_images(slots), "posterior": torch.stack([self.draw(slot) for slot in slots])}

    def means(self, images: list[int]) -> dict[str, torch.Tensor]:
        """Centre crops with zeros for noise, of which the model makes the means of the posteriors."""
        centers = self.centers(images)
        return {"images": centers, "posterior": torch.zeros(len(images), *self.shape(images[0]))}

    def size_of(self, slot: Slot) -> list[int]:
        return size_and_crop(self.images, slot.image, self.flipped(slot), self.corner(slot))


def size_and_crop(images: Images, index: int, flipped: bool, corner: tuple[int, int] | None = None) -> list[int]:
    """Original height and width, top and left of the crop, target height and width, of an image.

    The target is the image's own shape. The corner is where the crop lies in the picture that is scaled to cover it,
    and for a mirrored one in the mirrored picture.

    Args:
        corner: top and left before the crop is mirrored; None: of the centre.
    """
    (width, height), shape = images.original_size(index), images.shape(index)
    across, down = covering(width, height, shape)
    top, left = corner or ((down - shape.height) // 2, (across - shape.width) // 2)
    return [height, width, top, across - shape.width - left if flipped else left, *shape]


def make_batches(config: Config, kind: Kind, images: Images, encodings: Encodings | None) -> Batches:
    """The batches of some images: of their encodings for a model of latents, else of their pixels.

    Args:
        encodings: of these images, or of their captions alone where crops are random; None for a model of pixels.
    """
    data, training = config.data, config.training
    drawn = config.seed, kind.noise_scheduler.config.num_train_timesteps, training.timestep_sampling
    dropout, offset = training.condition_dropout, training.noise_offset
    if encodings is not None:
        made = EncodedBatches if encodings.have(images) else CroppedBatches
        return made(images, encodings, *drawn, data.random_flip, dropout, offset)
    labels = images.classes(kind.class_names) if kind.class_names else None
    return Batches(images, *drawn, data.crop, data.random_flip, labels, dropout, offset)


def find_encodings(
    config: Config, kind: Kind, images: Images, held_out: Images | None, prompts: Sequence[str]
) -> RequiredEncodings | None:
    """What of a run's images, captions and prompts the cache has encoded, and what is still to be made.

    Returns:
        None for a model of pixels.
    """
    encoders = kind.encoders()
    if encoders is None:
        return None
    parts: list[tuple[Images, Orientations]] = [(images, (False, True) if config.data.random_flip else (False,))]
    if kind.crop_encoder is not None:
        parts = [(images, ())]  # their captions alone
    if held_out is not None:
        parts.append((held_out, (False,)))
    return RequiredEncodings(encoders, parts, prompts)
