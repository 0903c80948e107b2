"""What a latent model is trained on: posteriors of images and embeddings of texts, encoded once and kept on disk.

An image's key is a hash of its pixels, so a changed picture of the same name and size is another entry; the encoder's
weights and settings are part of the folder's name. A flipped image is an entry of its own.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from finetune.core.distributed import all_agree, on_main_process, together
from finetune.core.errors import UserError
from finetune.core.kind import Encoders
from finetune.data.pixels import Images
from finetune.data.store import Store, key

T = TypeVar("T")


class Encodings:
    """The encodings that a run needs, in the cache or still to be made."""

    def __init__(self, encoders: Encoders, parts: Sequence[tuple[Images, bool]], prompts: Iterable[str]):
        """Find out what is there; encodes nothing.

        Args:
            parts: images with captions, and whether each is also needed flipped.
            prompts: further texts; the empty one is always among them.
        """
        self.encoders, self.parts = encoders, parts
        chunks = encoders.image_chunk, encoders.text_chunk
        self.posteriors = Store(("posteriors", encoders.image_key, chunks[0]), encoders.image_fields)
        self.embeddings = Store(("embeddings", encoders.text_key, chunks[1]), encoders.text_fields)
        captions = [images.captions.texts for images, _ in parts if images.captions is not None]
        self.texts = sorted({"", *prompts, *(text for texts in captions for text in texts)})
        self._find()

    def _find(self) -> None:
        """What is missing: (image's part, index, flipped) and texts; each once, however often the data have it."""
        self.posteriors.scan()
        self.embeddings.scan()
        images: dict[bytes, tuple[int, int, bool]] = {}
        for part, (pictures, flips) in enumerate(self.parts):
            for index in range(len(pictures)):
                for flipped in (False, True)[: 1 + flips]:
                    images.setdefault(image_key(pictures, index, flipped), (part, index, flipped))
        self.needed = len(images)
        self.missing_images = {name: place for name, place in images.items() if name not in self.posteriors.places}
        self.missing_texts = {key(text): text for text in self.texts if key(text) not in self.embeddings.places}

    @property
    def missing_bytes(self) -> int:
        """Bytes on disk of what is still to be made."""
        images, texts = len(self.missing_images), len(self.missing_texts)
        return images * self.posteriors.entry_bytes + texts * self.embeddings.entry_bytes

    @property
    def notes(self) -> list[str]:
        """Lines for the plan: what is encoded, its size on disk, and what is still to be made."""
        images, texts = self.needed, len(self.texts)
        size = images * self.posteriors.entry_bytes + texts * self.embeddings.entry_bytes
        lines = [f"encodings: {images} latents and {texts} texts, {size / 1e6:.1f} MB on disk"]
        if self.missing_bytes:
            lines[0] += (
                f"; still to be made: {len(self.missing_images)} and {len(self.missing_texts)}, "
                f"{self.missing_bytes / 1e6:.1f} MB"
            )
        captions = sorted({text for images, _ in self.parts if images.captions for text in images.captions.texts})
        if longer := self.encoders.truncated(captions):
            length = self.encoders.text_fields["text"][0]
            lines.append(f"captions cut off after {length} tokens: {len(longer)} of {len(captions)}, {longer[0]!r:.60}")
        return lines

    def make(self, accelerator: Accelerator) -> None:
        """Encode what is missing; the processes share the work. Called by all of them.

        Each piece is saved when it is complete, so an interrupted run continues with the next.

        Raises:
            UserError: on all processes, if there is no room or an encoder's output is not finite.
        """
        if all_agree(not self.missing_images and not self.missing_texts):
            return
        on_main_process(self._require_room)
        device = accelerator.device

        def encode_images(places: Sequence[tuple[int, int, bool]]) -> dict[str, torch.Tensor]:
            pixels = np.stack([oriented(self.parts[part][0], index, flipped) for part, index, flipped in places])
            return self.encoders.images(torch.from_numpy(pixels).permute(0, 3, 1, 2), device)

        def encode_texts(texts: Sequence[str]) -> dict[str, torch.Tensor]:
            return self.encoders.texts(texts, device)

        texts, images = self.encoders.text_chunk, self.encoders.image_chunk
        try:
            store, missing = self.embeddings, self.missing_texts
            together(partial(_make, accelerator, store, missing, encode_texts, texts, "Encoding captions"))
            self.encoders.free()  # before the VAE is loaded
            store, pictures = self.posteriors, self.missing_images
            together(partial(_make, accelerator, store, pictures, encode_images, images, "Encoding images"))
        finally:
            self.encoders.free()
        together(self._find)
        if self.missing_images or self.missing_texts:
            raise UserError(
                f"encodings: {self.posteriors.folder.parent}: found entries missing that were just made; expected a "
                "cache that nobody deletes from while it is used: run the same command again",
                exit_code=1,
            )

    def _require_room(self) -> None:
        folder = self.posteriors.folder
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < self.missing_bytes:
            raise UserError(
                f"encodings: {folder.parent}: found {free:,} bytes free, expected {self.missing_bytes:,} for "
                f"{len(self.missing_images)} latents and {len(self.missing_texts)} texts; free some, or set "
                "HF_DATASETS_CACHE to a larger disk"
            )

    def prompts(self) -> "Prompts":
        """The embeddings of all texts that the run needs, by text, the empty one among them."""
        return Prompts(self.embeddings, self.texts)


class Prompts(Mapping[str, dict[str, torch.Tensor]]):
    """Embeddings by text, each read from the disk when it is asked for."""

    def __init__(self, embeddings: Store, texts: Sequence[str]):
        self.embeddings, self.texts = embeddings, texts

    def __getitem__(self, text: str) -> dict[str, torch.Tensor]:
        return self.embeddings.read(key(text))

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


def image_key(images: Images, index: int, flipped: bool) -> bytes:
    """What stands for an image's pixels, shape and orientation."""
    return key(f"{images.checksum(index)}/{images.resolution}/{int(flipped)}")


def oriented(images: Images, index: int, flipped: bool) -> np.ndarray:
    """An image without augmentation, or mirrored: uint8 (H, W, C)."""
    pixels = images[index]
    return pixels[:, ::-1] if flipped else pixels


def _make(
    accelerator: Accelerator,
    store: Store,
    missing: Mapping[bytes, T],
    encode: Callable[[Sequence[T]], dict[str, torch.Tensor]],
    chunk: int,
    title: str,
) -> None:
    """This process's share of the pieces that are missing."""
    names = list(missing)
    pieces = [names[start : start + store.piece] for start in range(0, len(names), store.piece)]
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    shown = accelerator.is_main_process and bool(mine)
    with tqdm(total=sum(map(len, mine)), desc=title, unit="", disable=not shown, dynamic_ncols=True) as bar:
        for piece in mine:
            made: list[dict[str, torch.Tensor]] = []
            for start in range(0, len(piece), chunk):
                entries = piece[start : start + chunk]
                padded = [missing[name] for name in entries] + [missing[entries[0]]] * (chunk - len(entries))
                encoded = {name: tensor[: len(entries)] for name, tensor in encode(padded).items()}
                _check_finite(encoded, title)
                made.append(encoded)
                bar.update(len(entries))
            store.write(piece, {name: torch.cat([one[name] for one in made]) for name in store.fields})


def _check_finite(encoded: dict[str, torch.Tensor], title: str) -> None:
    for name, tensor in encoded.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"model.pretrained: found {name} that is not finite ({title.lower()}); expected encoders whose weights "
                "are finite"
            )
