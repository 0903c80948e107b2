"""Images whose pixels say where they come from, and their batches."""

import datasets
import numpy as np

from finetune.data.batches import Batches
from finetune.data.order import Slot
from finetune.data.pixels import FEATURES, Images, pixel_row


def wide_images(count: int = 6, height: int = 8, width: int = 14, channels: int = 3) -> Images:
    """Every pixel of image i is (row, column, i): what a crop shows says where it was cut."""
    rows, columns = np.indices((height, width))
    arrays = [np.stack([rows, columns, np.full_like(rows, i)], axis=2)[..., :channels] for i in range(count)]
    table = datasets.Dataset.from_list([pixel_row(a.astype(np.uint8)) for a in arrays], features=FEATURES)
    return Images(table, np.arange(count), channels, min(height, width))


def batches(images: Images, seed: int = 0, crop: str = "center", flip: bool = False, sampling="stratified") -> Batches:
    return Batches(images, seed, 1000, sampling, crop, flip)


SLOTS = [Slot(5, 3, 0, 1.5), Slot(2, 3, 1, 1.5), Slot(5, 3, 0, 0.0)]
