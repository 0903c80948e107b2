"""What many images cost: an epoch's order at 1, 10 and 100 million, how well it mixes and how it reads from a disk.

python tests/benchmarks/scale.py                      # about eight minutes on one CPU core
python tests/benchmarks/scale.py --only losses        # one of its tables
python tests/benchmarks/scale.py --short              # the smallest sizes: a smoke test
"""

import json
import os
import tracemalloc
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from environment import FOLDER, ROOT, machine, parser

import datasets
import numpy as np
import pyarrow as pa
import torch
from bare import seconds
from table import head, row

from finetune.config.load import load_config
from finetune.core.batch import BatchLayout
from finetune.core.randomness import GOLDEN_RATIO_FRACTION, conditions_dropped, timesteps, uniform
from finetune.data import order as orders
from finetune.data.blocks import SPAN, BlockOrder
from finetune.data.order import WindowSampler, make_order
from finetune.data.pixels import FEATURES, Images, pixel_row
from finetune.data.sources import open_source
from harness.faults import skip_the_export
from harness.in_process import train_here

ORDERS = "full", "blocks"
LAYOUT = BatchLayout(16, 4, 1)  # updates of 64


def costs(short: bool) -> None:
    """Of each order: resuming in the middle of an epoch, what is held, and slot after slot from there."""
    head("images, order", "seek to the middle of an epoch", "memory", "a slot")
    for count in (10**5,) if short else (10**6, 10**7, 10**8):
        for name in ORDERS:
            sampler = WindowSampler(count, 0, LAYOUT, None, name)
            sampler.seek(1, len(sampler) // 8)
            slots = iter(sampler)
            tracemalloc.start()
            found = seconds(lambda slots=slots: next(slots))
            memory = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            many = 1000 if short else 10_000
            each = seconds(lambda slots=slots, many=many: [next(slots) for _ in range(many)]) / many / 16
            cells = f"{1000 * found:,.0f} ms", f"{memory / 1e6:,.1f} MB", f"{1e6 * each:.2f} µs"
            row(f"{count:,}, {name}", *cells)


def draws(short: bool) -> None:
    """What an update lists of its window: one by one, as a loop over the formula, and at once."""
    count = 256 if short else 16_384
    places = range(10**7, 10**7 + count)

    def stratified() -> list[int]:
        return [
            int(1000 * ((uniform(0, "timesteps", 3, 0, 1)[0] + place * GOLDEN_RATIO_FRACTION) % 1)) for place in places
        ]

    def independent() -> list[int]:
        return [int(1000 * uniform(0, "timestep", 3, place, 1)[0]) for place in places]

    def dropped() -> list[bool]:
        return [uniform(0, "condition dropout", 3, place, 1)[0] < 0.1 for place in places]

    head(f"of a window of {count:,}", "one by one", "at once", "equal")
    for name, one_by_one, at_once in (
        ("timesteps, stratified", stratified, lambda: timesteps(0, 3, places, 1000, "stratified")),
        ("timesteps, uniform", independent, lambda: timesteps(0, 3, places, 1000, "uniform")),
        ("dropped conditions", dropped, lambda: conditions_dropped(0, 3, places, 0.1)),
    ):
        times = [min(seconds(call) for _ in range(5)) for call in (one_by_one, at_once)]
        equal = sum(one == other for one, other in zip(one_by_one(), at_once().tolist(), strict=True))
        row(name, *(f"{1000 * each:.2f} ms" for each in times), f"{equal:,} of {count:,}")


def mixing(short: bool) -> None:
    """How far apart an order puts images that are adjacent in the source, compared with a full shuffle."""
    count = 10**5 if short else 10**6
    found = {name: make_order(name, 0, count).images(0, range(count)) for name in ORDERS}
    head(f"{count:,} images", *ORDERS, "a full shuffle's expectation")

    def apart(images: np.ndarray) -> float:
        positions = np.empty(count, dtype=np.int64)
        positions[images] = np.arange(count)
        return np.abs(np.diff(positions)).mean()

    row("mean positions between images adjacent in the source", *(f"{apart(found[name]):,.0f}" for name in ORDERS),
        f"{(count + 1) / 3:,.0f}")  # fmt: skip

    def in_company(size: int, images: np.ndarray) -> float:
        """Share of the images that are in an update with another one of their span."""
        windows = np.sort(images[: count // size * size].reshape(-1, size) // SPAN, axis=1)
        same = windows[:, 1:] == windows[:, :-1]
        edge = np.zeros((len(windows), 1), dtype=bool)
        return (np.hstack([same, edge]) | np.hstack([edge, same])).mean()

    for size in (64, 256, 1024):
        expected = 1 - np.prod(1 - (SPAN - 1) / (count - np.arange(1, size)))
        shares = (f"{in_company(size, found[name]):.1%}" for name in ORDERS)
        row(f"images of an update of {size} with another of their span of {SPAN}", *shares, f"{expected:.1%}")

    classes = 100  # of a source that is sorted by them
    for size in (64, 1024, 16_384):
        expected = size / classes * (1 - 1 / classes) * (count - size) / (count - 1)
        spreads = []
        for name in ORDERS:
            parts = (found[name][: count // size * size] // (count // classes)).reshape(-1, size)
            counts = np.stack([np.bincount(part, minlength=classes) for part in parts])
            spreads.append(f"{((counts - size / classes) ** 2).mean() / expected:.2f}")
        row(f"variance of a class's images in {size:,} in a row, of a sorted source", *spreads, "1.00")


def losses(short: bool) -> None:
    """configs/digits.yaml under a full shuffle and in blocks as small as the data set: the loss of held-out images."""
    length, seeds = ("training.max_train_steps=2", range(2)) if short else ("training.num_epochs=3", range(4))
    head("digits, order", "validation/loss_ema", "against full, seed by seed")
    by_class = str(Path(FOLDER.name, "sorted.parquet"))
    digits = open_source("digits").splits["train"]
    digits.select(np.argsort(digits["label"], kind="stable")).to_parquet(by_class)
    small, found = partial(BlockOrder, span=4, block=2, stripes=16), {}
    for source, name in product(("digits", by_class), ORDERS):
        for seed in seeds:
            orders.BlockOrder = small
            output = Path(FOLDER.name, f"{name}-{Path(source).stem}-{seed}")
            options = {"seed": seed, "output_dir": output, "data.source": source, "data.order": name}
            options |= {"validation.every_steps": 10_000, "samples.count": 0, "checkpoint.every_steps": 10_000}
            options |= {"validation.images": 4} if short else {}
            overrides = [length, *(f"{key}={value}" for key, value in options.items())]
            config = load_config(ROOT / "configs/digits.yaml", overrides)
            train_here(config)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            losses = [line["validation/loss_ema"] for line in lines if "validation/loss_ema" in line]
            found[name, source, seed] = losses[-1]
            orders.BlockOrder = BlockOrder
        ends = [found[name, source, seed] for seed in seeds]
        apart = [found[name, source, seed] / found["full", source, seed] - 1 for seed in seeds]
        what = f"{name}{', sorted by class' if source == by_class else ''}"
        row(what, f"{mean(ends):.5f} ± {stdev(ends):.5f}", f"{mean(apart):+.2%} ± {stdev(apart):.2%}")


def reading(short: bool) -> None:
    """Images of 32 x 32 from an arrow file that the system has not cached, mapped as a run maps them.

    The full shuffle reads fewer images: else what the system reads ahead would be the whole file before the end.
    """
    count = 5_000 if short else 400_000
    reads = {"full": 100 if short else 4_096, "blocks": 2_000 if short else 65_536}
    file, random = Path(FOLDER.name, "store.arrow"), np.random.default_rng(0)
    with pa.OSFile(str(file), "wb") as opened, pa.ipc.new_stream(opened, FEATURES.arrow_schema) as stream:
        for _ in range(count // 1000):
            rows = [pixel_row(pixels) for pixels in random.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)]
            stream.write(pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema))
    head(f"{count:,} images, {file.stat().st_size / 1e9:.2g} GB", "images/s", "bytes read from the disk over theirs")
    for name, read in reads.items():
        images = Images(datasets.Dataset.from_file(str(file)), np.arange(count), 3, 32)
        forget_pages(file)  # Arrow asks the system to read ahead what it maps
        numbers = make_order(name, 0, count).images(0, range(read)).tolist()
        before = bytes_from_disk()
        found = seconds(lambda images=images, numbers=numbers: [images.pixels(number).copy() for number in numbers])
        ratio = (bytes_from_disk() - before) / (read * 32 * 32 * 3)
        row(f"{name}, {read:,} of them", f"{read / found:,.0f}", f"{ratio:.1f}")
        del images  # the system keeps what is mapped


def forget_pages(file: Path) -> None:
    """Have the system drop a file from its cache."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


TABLES = {table.__name__: table for table in (costs, draws, mixing, losses, reading)}


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--only", choices=TABLES, help="one table")
    arguments = command.parse_args()
    torch.set_num_threads(1)
    skip_the_export()
    print(machine())
    for name, table in TABLES.items():
        if arguments.only in (None, name):
            table(arguments.short)


if __name__ == "__main__":
    with FOLDER:
        main()
