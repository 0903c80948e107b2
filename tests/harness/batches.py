"""Images whose pixels say where they come from, and their batches."""

from collections.abc import Sequence

import datasets
import numpy as np

from finetune.data.batches import Batches
from finetune.data.captions import Captions
from finetune.data.order import Slot
from finetune.data.pixels import FEATURES, Images, pixel_row


def wide_images(count: int = 6, height: int = 8, width: int = 14, channels: int = 3) -> Images:
    """Every pixel of image i is (row, column, i): what a crop shows says where it was cut."""
    rows, columns = np.indices((height, width))
    return as_images([np.stack([rows, columns, np.full_like(rows, i)], axis=2)[..., :channels] for i in range(count)])


def as_images(arrays: Sequence[np.ndarray], captions: Captions | None = None) -> Images:
    """Images of one size, of arrays (H, W, C); their resolution is the shorter side."""
    table = datasets.Dataset.from_list([pixel_row(array.astype(np.uint8)) for array in arrays], features=FEATURES)
    height, width, channels = arrays[0].shape
    return Images(table, np.arange(len(arrays)), channels, min(height, width), captions=captions)


def batches(images: Images, seed: int = 0, crop: str = "center", flip: bool = False, sampling="stratified") -> Batches:
    return Batches(images, seed, 1000, sampling, crop, flip)


SLOTS = [Slot(5, 3, 0, 1.5), Slot(2, 3, 1, 1.5), Slot(5, 3, 0, 0.0)]
