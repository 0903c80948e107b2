"""What a latent model is trained on: posteriors of images and embeddings of texts, encoded once and kept on disk.

An image's key is a hash of its pixels, so a changed picture of the same name and size is another entry; the encoder's
weights and settings are part of the folder's name. A flipped image is an entry of its own.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from finetune.core.distributed import all_agree, together
from finetune.core.errors import UserError
from finetune.core.files import LARGER_CACHE, require_room
from finetune.core.kind import Encoders
from finetune.core.shapes import Shape
from finetune.data.pieces import Piece, find_share, make_pieces, pieces_of
from finetune.data.pixels import Images, Pixels
from finetune.data.store import Store, key

Orientations = Sequence[bool]  # of an image: whether it is mirrored


class RequiredEncodings:
    """The encodings that a run needs: what the cache has of them, and what is still to be made."""

    def __init__(self, encoders: Encoders, parts: Sequence[tuple[Images, Orientations]], prompts: Iterable[str]):
        """Find out what is there; encodes nothing.

        Args:
            parts: images with captions, and the orientations that each is needed in: none where the model encodes
                random crops of them itself, while it is trained.
            prompts: further texts; the empty one is always among them.
        """
        self.encoders, self.parts, self.asked = encoders, parts, sorted({*prompts})
        shapes = sorted({shape for images, _ in parts for shape in images.shapes})
        self.posteriors = {shape: self._store(shape) for shape in shapes}  # each holds entries of one shape
        self.embeddings = Store(("embeddings", encoders.text_key, encoders.text_chunk), encoders.text_fields)
        captions = [images.captions.texts for images, _ in parts if images.captions is not None]
        self.texts = sorted({"", *self.asked, *(text for texts in captions for text in texts)})
        images = self._oriented()
        self.needed = Counter(image.shape for image in images.values())
        self.missing_images = {
            name: image for name, image in images.items() if name not in self.posteriors[image.shape].places
        }
        self.missing_texts = {key(text): text for text in self.texts if key(text) not in self.embeddings.places}

    def _store(self, shape: Shape) -> Store:
        made_by = "posteriors", self.encoders.image_key, self.encoders.image_chunk(shape)
        return Store(made_by, self.encoders.image_fields(shape))

    def _oriented(self) -> "dict[bytes, Oriented]":
        """The images in their orientations, each once, however often the data have it."""
        images: dict[bytes, Oriented] = {}
        for pictures, orientations in self.parts:
            for index in range(len(pictures)):
                for flipped in orientations:
                    images.setdefault(image_key(pictures, index, flipped), Oriented(pictures, index, flipped))
        return images

    @property
    def missing_bytes(self) -> int:
        """Bytes on disk of what is still to be made."""
        return self._bytes(Counter(image.shape for image in self.missing_images.values()), len(self.missing_texts))

    def _bytes(self, images: Mapping[Shape, int], texts: int) -> int:
        entries = sum(count * self.posteriors[shape].entry_bytes for shape, count in images.items())
        return entries + texts * self.embeddings.entry_bytes

    @property
    def notes(self) -> list[str]:
        """Lines for the plan: what is encoded, its size on disk, and what is still to be made."""
        images, count = self.needed.total(), len(self.texts)
        size = self._bytes(self.needed, count)
        lines = [f"encodings: {images} latents and {count} texts, {size / 1e6:.1f} MB on disk"]
        if self.missing_bytes:
            lines[0] += (
                f"; still to be made: {len(self.missing_images)} and {len(self.missing_texts)}, "
                f"{self.missing_bytes / 1e6:.1f} MB"
            )
        captions = sorted({text for images, _ in self.parts if images.captions for text in images.captions.texts})
        for kind, texts in (("captions", captions), ("prompts", sorted({*self.asked} - {*captions}))):
            if longer := self.encoders.truncated(texts):
                length = self.encoders.text_fields["text"][0]
                lines.append(f"{kind} cut off after {length} tokens: {len(longer)} of {len(texts)}, {longer[0]!r:.60}")
        return lines

    def make(self, accelerator: Accelerator, images: int | None = None) -> "Encodings":
        """Encode what is missing; processes that see the same cache share the work. Called by all processes.

        Each piece is saved when it is complete, so an interrupted run continues with the next.

        Args:
            images: encode only this many training images, the first ones, with their first captions, and no prompts;
                None: everything.

        Returns:
            What can be read then, which are the entries asked for and all that were there before.

        Raises:
            UserError: on all processes, if there is no room for everything, an encoder's output is not finite, or what
                was made is gone again.
        """
        wanted_images, wanted_texts = self._missing(images)
        if all_agree(not wanted_images and not wanted_texts):
            return self._encodings()
        together(self._require_room)
        share, device = find_share(self.embeddings.folder.parent), accelerator.device

        def encode_images(oriented: Sequence[Oriented]) -> dict[str, torch.Tensor]:
            pixels = np.stack([image.pixels for image in oriented])
            return self.encoders.images(torch.from_numpy(pixels).permute(0, 3, 1, 2), device)

        def encode_texts(texts: Sequence[str]) -> dict[str, torch.Tensor]:
            return self.encoders.texts(texts, device)

        texts = list(pieces_of(self.embeddings, self.encoders.text_chunk, wanted_texts))
        try:
            together(partial(make_pieces, share, texts, encode_texts, "Encoding captions"))
            self.encoders.free()  # before the VAE is loaded
            pieces = self.image_pieces(wanted_images)
            together(partial(make_pieces, share, pieces, encode_images, "Encoding images"))
        finally:
            self.encoders.free()
        return together(partial(self._found, images))

    def _found(self, images: int | None) -> "Encodings":
        """What was made, by this process and by others."""
        now = RequiredEncodings(self.encoders, self.parts, self.asked)
        if any(now._missing(images)):
            raise UserError(
                f"encodings: {self.embeddings.folder.parent}: found entries missing that were just made; expected a "
                "cache that nobody deletes from while it is used: run the same command again",
                exit_code=1,
            )
        return now._encodings()

    def _encodings(self) -> "Encodings":
        texts = Embeddings(self.embeddings, self.encoders.no_text)
        encoded = [images for images, orientations in self.parts if orientations]
        return Encodings(self.posteriors, texts, self.encoders.sized, encoded)

    def _missing(self, images: int | None) -> "tuple[dict[bytes, Oriented], dict[bytes, str]]":
        """What is missing of the images and texts that `make` is asked for."""
        if images is None:
            return self.missing_images, self.missing_texts
        pictures, _ = self.parts[0]
        first, captions = range(min(images, len(pictures))), pictures.captions
        names = {image_key(pictures, index, False) for index in first}
        told = {captions.texts[captions.first(index)] for index in first} if captions is not None else set()
        return (
            {name: image for name, image in self.missing_images.items() if name in names},
            {name: text for name, text in self.missing_texts.items() if text in {"", *told}},
        )

    def image_pieces(self, missing: "Mapping[bytes, Oriented]") -> "list[Piece[Oriented]]":
        """Images that are missing, each piece of one shape."""
        pieces: list[Piece[Oriented]] = []
        for shape, store in self.posteriors.items():
            of_shape = {name: image for name, image in missing.items() if image.shape == shape}
            pieces += pieces_of(store, self.encoders.image_chunk(shape), of_shape)
        return pieces

    def _require_room(self) -> None:
        content = f"{len(self.missing_images)} latents and {len(self.missing_texts)} texts"
        folder = self.embeddings.folder.parent
        require_room(f"encodings: {folder}", folder, self.missing_bytes, content, LARGER_CACHE)


class Embeddings:
    """Embeddings of texts, each read from the disk when it is asked for."""

    def __init__(self, store: Store, no_text: str | None):
        """
        Args:
            no_text: the text that stands for no caption; None: zeros do.
        """
        self.store, self.no_text = store, no_text

    def embed(self, texts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        """What the network is conditioned on, by name, each (b, ...) in the default dtype; see `core.kind.Embed`."""
        entries = [self._entry(text) for text in texts]
        dtype = torch.get_default_dtype()
        return {name: torch.stack([entry[name] for entry in entries]).to(dtype) for name in self.store.fields}

    def _entry(self, text: str | None) -> dict[str, torch.Tensor]:
        text = self.no_text if text is None else text
        if text is None:
            return {name: torch.zeros(shape) for name, shape in self.store.fields.items()}
        return self.store.read(key(text))


@dataclass(frozen=True)
class Encodings:
    """Encodings that are in the cache, as batches and samples read them.

    Attributes:
        posteriors: of images: those of a shape in one store, by `image_key`.
        texts: the embeddings of captions and prompts.
        sized: whether the network is conditioned on the size and crop of an image.
        images: those that are encoded; of others the model encodes random crops itself.
    """

    posteriors: Mapping[Shape, Store]
    texts: Embeddings
    sized: bool
    images: Sequence[Images]

    def have(self, images: Images) -> bool:
        """Whether these are images that are encoded, and not random crops of them by the model."""
        return any(encoded is images for encoded in self.images)


class Oriented(NamedTuple):
    """An image without augmentation, or mirrored."""

    images: Images
    image: int
    flipped: bool

    @property
    def shape(self) -> Shape:
        return self.images.shape(self.image)

    @property
    def pixels(self) -> Pixels:
        """uint8 (H, W, C)."""
        pixels = self.images[self.image]
        return pixels[:, ::-1] if self.flipped else pixels


def image_key(images: Images, index: int, flipped: bool) -> bytes:
    """What stands for an image's pixels, shape and orientation."""
    height, width = images.shape(index)
    sides = str(height) if height == width else f"{height}x{width}"
    return key(f"{images.checksum(index)}/{sides}/{int(flipped)}")
