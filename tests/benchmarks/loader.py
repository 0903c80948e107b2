"""How fast images are loaded: from the cache, on the first pass over large photographs, and at the next start.

python tests/benchmarks/loader.py            # about four minutes on two CPU cores
python tests/benchmarks/loader.py --short    # the smallest sizes: a smoke test
"""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from environment import FOLDER, machine, parser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bare import BareLoop, beside_the_trainer, milliseconds, ratio, run_config, seconds, unet_config
from diffusers import UNet2DModel
from PIL import Image, JpegImagePlugin
from table import head, row

from finetune.config.inputs import DataConfig
from finetune.core.batch import BatchLayout
from finetune.core.kind import ImageFormat
from finetune.data.batches import Batches
from finetune.data.loading import load_data
from finetune.data.order import WindowSampler
from finetune.data.pixels import Images
from finetune.data.workers import make_loader

MICRO_BATCH = 16
LIMIT = 20_000  # images/s from the cache at 64 x 64, on one process


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def small_images(count: int) -> str:
    """A parquet file of 64 x 72 noise, as BMP, which costs least to write."""
    random = np.random.default_rng(0)
    rows = [encoded(random.integers(0, 256, (64, 72, 3), dtype=np.uint8), "BMP") for _ in range(count)]
    pq.write_table(pa.table({"image": rows}), f"{FOLDER.name}/small.parquet", row_group_size=1000)
    return f"{FOLDER.name}/small.parquet"


def photographs(count: int, width: int, height: int) -> str:
    """A folder of JPEGs with coarse and fine detail, about as large as a camera's."""
    random = np.random.default_rng(0)
    folder = Path(FOLDER.name, "photographs")
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
        grain = random.normal(0, 8, (height // 4, width, 3)).astype(np.int16)
        photo = np.clip(np.asarray(coarse) + np.tile(grain, (5, 1, 1))[:height], 0, 255).astype(np.uint8)
        (folder / f"{number:03}.jpg").write_bytes(encoded(photo, "JPEG", quality=90))
    return str(folder)


def load(source: str, **options: str) -> Images:
    """The images of a source at 64 x 64, none held out, decoded unless the cache has them."""
    config = DataConfig(source=source, validation_fraction=0, **options)
    return load_data(config, ImageFormat(3, 64), 0)[0]


def resident() -> tuple[float, float] | None:
    """MiB of this process's own memory, and of mapped files, which the system takes back when it needs room."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


def from_the_cache(count: int, rounds: int) -> Iterator[tuple[str, str, str]]:
    images = load(small_images(count), crop="random")
    sampler = WindowSampler(count, 0, BatchLayout(MICRO_BATCH, 1, 1))

    def batches(crop: str, flip: bool) -> Batches:
        return Batches(images, 0, 1000, "stratified", crop, flip)

    def rate(read: Callable) -> float:
        """The fastest of some rounds, to exclude other load."""
        best = min(seconds(lambda: [read(slots) for slots in sampler]) for _ in range(rounds))
        return count / best

    dealing = rate(lambda slots: None)
    for name, read in (
        ("images alone", batches("center", False).read_images),
        ("images, cropped and flipped at random", batches("random", True).read_images),
    ):
        found = 1 / (1 / rate(read) - 1 / dealing)
        yield f"64 px from the cache, {name}", f"{found:,.0f} images/s", f"{found / LIMIT:.2f} of {LIMIT:,}"
    found = rate(batches("random", True).__getitems__)
    yield "the same with noise and timesteps", f"{found:,.0f} images/s", ""
    loader = make_loader(batches("random", True), sampler, num_workers=2, pin_memory=False)
    sum(1 for _ in loader)  # starts the workers
    found = count / min(seconds(lambda: sum(1 for _ in loader)) for _ in range(rounds))
    yield "the same through two workers", f"{found:,.0f} images/s", ""


def memory(count: int) -> Iterator[tuple[str, str, str]]:
    images = load(f"{FOLDER.name}/small.parquet", crop="random")
    batches = Batches(images, 0, 1000, "stratified", "random", True)
    few, before = count // 20, resident()
    if before is None:
        return
    found = []
    for part in (few, count):
        for slots in WindowSampler(part, 0, BatchLayout(MICRO_BATCH, 1, 1)):
            batches.read_images(slots)
        found.append(resident())
    growth = [after - earlier for after, earlier in zip(found[1], found[0], strict=True)]
    yield f"own memory, from {few:,} to {count:,} images read", f"{growth[0]:+.1f} MiB", ""
    yield "mapped files, which the system drops when it needs room", f"{growth[1]:+.1f} MiB", ""


def first_pass(count: int, width: int, height: int) -> Iterator[tuple[str, str, str]]:
    source = photographs(count, width, height)
    draft, available = JpegImagePlugin.JpegImageFile.draft, os.sched_getaffinity
    every = len(available(0))
    slowest = None
    for reduced in (False, True):
        for cores in (1, every):
            JpegImagePlugin.JpegImageFile.draft = draft if reduced else lambda *_: None
            os.sched_getaffinity = lambda _, cores=cores: set(range(cores))
            # Another background is another place in the cache, and changes nothing about a JPEG.
            background = f"#{reduced:02x}{cores:04x}"
            found = seconds(lambda background=background: load(source, background=background)) / count
            slowest = slowest or found
            how = f"{'reduced' if reduced else 'full'} decoding, cores: {cores}"
            what = f"first pass over photographs of {width * height / 1e6:.1f} megapixels, {how}"
            yield what, f"{1000 * found:.0f} ms each", f"{slowest / found:.1f}x"
    JpegImagePlugin.JpegImageFile.draft, os.sched_getaffinity = draft, available
    again = seconds(lambda: load(source, background=background))
    yield f"next start on the same {count} photographs", f"{1000 * again:.0f} ms", ""


def beside_photographs(source: str, updates: int) -> Iterator[tuple[str, str, str]]:
    """Updates of train.main on photographs, in turns with the bare loop's on noise in memory."""
    unet = unet_config()
    config = run_config(
        "run", unet, 8, data__source=source, data__crop="random", data__random_flip=True, data__num_workers=1,
        training__micro_batch_size=8, training__gradient_accumulation_steps=1, training__num_epochs=1000,
    )  # fmt: skip
    found = beside_the_trainer(config, BareLoop(UNet2DModel(**unet), 8).update, updates)
    yield "an update on photographs over the bare loop's", milliseconds(found), f"{ratio(found):.3f} of 1.05"


def main() -> None:
    short = parser(__doc__).parse_args().short
    torch.set_num_threads(1)
    print(machine())
    head("images", "measured", "of the limit")
    count, rounds = (400, 1) if short else (20_000, 3)
    size = (8, 640, 480) if short else (24, 4000, 3000)
    beside = beside_photographs(f"{FOLDER.name}/photographs", 2 if short else 30)
    for part in (from_the_cache(count, rounds), memory(count), first_pass(*size), beside):
        for cells in part:
            row(*cells)
    started = seconds(lambda: load(f"{FOLDER.name}/small.parquet", crop="random"))
    row(f"next start on {count:,} images in parquet", f"{1000 * started:.0f} ms", "")


if __name__ == "__main__":
    with FOLDER:
        main()
