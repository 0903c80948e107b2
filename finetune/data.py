"""A dataset from any source as what the loop is fed: checked, decoded once, its slots made into batches.

What a batch holds depends on its slots alone, not on the process or worker that reads it.
"""

import os
import signal
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from finetune import randomness, windows
from finetune.config import DataConfig
from finetune.decoding import decoded
from finetune.errors import UserError
from finetune.images import BadImageError, check_format, decode, quiet
from finetune.pixels import FEATURES, FORMAT, Images, error_row, pixel_row
from finetune.selection import select
from finetune.sources import Source, explained, open_source

LISTED = 20  # bad images that one error names


def load_images(config: DataConfig, channels: int, resolution: int) -> Images:
    """The images of `config.split` at a resolution, in the channels of the network; decoded unless the cache has them.

    On several processes the main one goes first (`accelerator.main_process_first()`): the others find the cache filled,
    with the validation split too.

    Raises:
        UserError: no such source, split, column or label; no room; bad images, all in one error, unless
            `on_bad_image: skip` leaves them out; nothing left.
    """
    check_format(channels, config.background)
    source = open_source(config.source)
    if config.validation_split is not None:
        _load(source, config, config.validation_split, "data.validation_split", channels, resolution)
    return _load(source, config, config.split, "data.split", channels, resolution)


def split_images(images: Images, config: DataConfig, seed: int) -> tuple[Images, Images | None]:
    """Images to train on and images held out: `config.validation_split`, or a fraction chosen by the seed alone."""
    if config.validation_split is not None:
        source, key = open_source(config.source), "data.validation_split"
        return images, _load(source, config, config.validation_split, key, images.channels, images.resolution)
    held_out = windows.held_out(seed, len(images), config.validation_fraction)
    if not len(held_out):
        return images, None
    return images.select(np.delete(np.arange(len(images)), held_out)), images.select(held_out)


def _load(source: Source, config: DataConfig, split: str, key: str, channels: int, resolution: int) -> Images:
    chosen = select(source.splits, config, split, key)
    if not len(chosen.rows):
        raise UserError(f"{key}: found no images in {split!r} of {config.source}; expected at least one")
    options = {"channels": channels, "resolution": resolution, "crop": config.crop, "background": config.background}
    with explained(config.source), quiet():
        decode_row = partial(_decode_row, folders=source.folders, **options)
        identity, size = repr((FORMAT, options)), resolution**2 * channels
        table = decoded(chosen.dataset, chosen.image_column, chosen.rows, decode_row, FEATURES, identity, size)
    errors = table.data.column("error")
    bad = np.flatnonzero(errors.is_valid().to_numpy())
    problems = []
    for index, row in zip(bad.tolist(), chosen.rows[bad].tolist(), strict=True):
        name = source.describe(row, chosen.dataset[row][chosen.image_column])
        problems.append(f"{name}: {errors[index].as_py()}")
    if problems and (config.on_bad_image == "error" or len(problems) == len(table)):
        listed = problems[:LISTED] + ([f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else [])
        advice = "mend or remove them" + (", or set data.on_bad_image=skip" if config.on_bad_image == "error" else "")
        found = f"found {len(problems)} of {len(table)} images bad"
        raise UserError(f"data.source: {config.source}: {found}; {advice}", *listed)
    good = np.delete(np.arange(len(table)), bad)
    labels = None if chosen.labels is None else chosen.labels[good]
    return Images(table, good, channels, resolution, labels, chosen.label_names, problems)


def _decode_row(image: dict | None, folders: tuple[str, ...], **options) -> dict:
    """A row of the cache from what a dataset holds for a picture. A path must lie in one of the folders."""
    try:
        return pixel_row(decode(_encoded(image or {}, folders), **options))
    except BadImageError as error:
        return error_row(str(error))


def _encoded(image: dict, folders: tuple[str, ...]) -> bytes | str:
    data, path = image.get("bytes"), image.get("path")
    if data is not None:
        return data
    if not path:
        raise BadImageError("has no picture")
    if not any(os.path.abspath(path).startswith(folder + os.sep) for folder in folders):
        raise BadImageError("has no picture, only a path, which is not followed out of a dataset")
    return os.path.abspath(path)


class Batches(Dataset):
    """What the slots of a micro-batch hold. Each value is a function of (seed, epoch, position) and the image."""

    def __init__(
        self,
        images: Images,
        seed: int,
        num_train_timesteps: int,
        timestep_sampling: str,
        resolution: int,
        crop: str,
        random_flip: bool,
    ):
        self.images, self.seed, self.resolution = images, seed, resolution
        self.num_train_timesteps, self.timestep_sampling = num_train_timesteps, timestep_sampling
        self.crop, self.random_flip = crop, random_flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, slots: list[windows.Slot]) -> dict[str, torch.Tensor]:
        """A batch of b slots.

        Returns:
            images: uint8 (b, C, resolution, resolution), contiguous.
            noise: standard normal, of the same shape, in the default dtype.
            timesteps: int64 (b,), in 0 .. num_train_timesteps - 1.
            weights: default dtype (b,), 0 for padding.
            image_ids: int64 (b,), indices into the images given.
            positions: int64 (b,).
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
            "image_ids": torch.tensor([int(slot.image) for slot in slots]),
            "positions": torch.tensor([slot.position for slot in slots]),
        }

    def read_images(self, slots: list[windows.Slot]) -> torch.Tensor:
        """The images of b slots, cropped and flipped: uint8 (b, C, resolution, resolution)."""
        images = torch.empty(len(slots), self.images.channels, self.resolution, self.resolution, dtype=torch.uint8)
        channels_last = images.numpy().transpose(0, 2, 3, 1)  # a view: pixels go straight to their place
        for place, slot in enumerate(slots):
            channels_last[place] = self._augmented(slot)
        return images

    def _augmented(self, slot: windows.Slot) -> np.ndarray:
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


def make_loader(dataset: Batches, sampler: windows.WindowSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader of the sampler's batches, in its order. A worker that dies raises RuntimeError: see `loader_problem`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_hand_over,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, torch.get_default_dtype()),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each epoch draws from the global one
    )


def _hand_over(batch: dict[str, torch.Tensor]) -> "dict[str, torch.Tensor] | _Parcel":
    return batch if torch.utils.data.get_worker_info() is None else _Parcel(batch)


class _Parcel:
    """A batch on its way out of a worker, a dict again when it arrives.

    A tensor travels in a block of shared memory of its own, at about half a millisecond; one number a slot goes faster
    through the pipe. Packed at once: the queue's thread would drop one that finds no room, and all would wait for it.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.numbers = {name: tensor.numpy() for name, tensor in batch.items() if tensor.dim() == 1}
        shared = {name: tensor for name, tensor in batch.items() if name not in self.numbers}
        self.packed = bytes(ForkingPickler.dumps(shared))

    def __reduce__(self) -> tuple:
        return _unpack, (self.packed, self.numbers)


def _unpack(packed: bytes, numbers: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    try:
        shared = ForkingPickler.loads(packed)
    except (OSError, EOFError) as error:  # the worker that holds the memory is gone
        time.sleep(1)  # its end is told by a signal, which raises here instead of in the middle of what follows
        raise RuntimeError("DataLoader worker exited unexpectedly") from error
    return shared | {name: torch.from_numpy(values) for name, values in numbers.items()}


def _start_worker(dtype: torch.dtype, worker: int) -> None:
    """Signals reach every process of a run, but the main one decides what to finish."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()
    torch.set_default_dtype(dtype)  # a spawned worker starts with float32


def _obey_the_main_process() -> None:
    """Ends this worker at a SIGTERM from its parent alone, which would otherwise wait for it forever when it exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def loader_problem(error: RuntimeError | OSError | MemoryError) -> UserError | None:
    """What a user can do about an error out of the loader; None if it is none of the loader's workers."""
    text = str(error)
    if "Bus error" in text or "shared memory" in text or "No space left on device" in text:
        cause = "found no room in shared memory (/dev/shm) for its batches"
    elif "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        cause = "a data worker was killed, most likely for want of memory"
    else:
        return None
    advice = "set data.num_workers=0 or free some, and run the same command again"
    return UserError(f"data.num_workers: {cause}; {advice}", exit_code=1)
