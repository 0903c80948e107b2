"""What pictures of many shapes cost: micro-steps and waiting by layout, time an image, and the noise scale's bias.

python tests/benchmarks/shapes.py                        # sizes of a stated distribution; two minutes on two CPU cores
python tests/benchmarks/shapes.py --pictures FOLDER      # sizes of the pictures in a folder
python tests/benchmarks/shapes.py --compile              # torch.compile alone
python tests/benchmarks/shapes.py --short                # the smallest sizes: a smoke test
"""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from environment import FOLDER, machine, parser

import numpy as np
import torch
from bare import unet_config
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from table import head, row
from torch._inductor import config as inductor

from finetune.core.batch import BatchLayout
from finetune.core.dealing import Dealing, deal_by_shape, deal_evenly
from finetune.core.shapes import Shape, cropped, nearest, run_shapes
from finetune.models.unconditional import Unconditional
from finetune.training.noise_scale import GradientNoiseScale
from finetune.training.objective import loss_per_image
from harness.compare import relative_difference, weights
from harness.configs import UNET, picture, tiny_config, write_config
from harness.several_runs import run_configs
from harness.shapes import SHAPES, write_shapes

# (width, height) -> share: about what a camera and a telephone make
STATED = {(3000, 2000): 0.4, (2000, 3000): 0.15, (4000, 3000): 0.2, (1080, 1920): 0.15, (2000, 2000): 0.1}
BATCHES, MICRO, PROCESSES, BUCKETS = (16, 64, 256), (1, 4, 8), (1, 2, 8, 64), (3, 5, 7)
RESOLUTION, DIVISOR = 512, 64
# (resolution, divisor) -> numbers of shapes
LADDERS = {(512, 64): (3, 5, 7), (1024, 64): (3, 5, 7, 9), (512, 32): (9,), (512, 8): (9,)}


def sizes_in(folder: Path | None, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(width, height) of the pictures of at least 600 pixels a side, not the thumbnails beside them."""
    if folder is None:
        drawn = rng.choice(len(STATED), 1000, p=list(STATED.values()))
        return [list(STATED)[index] for index in drawn]
    sizes = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and not file.is_symlink():
            with Image.open(file) as opened:
                sizes.append(opened.size)
    return [size for size in sizes if min(size) >= 600]


def windows(shapes: list[int], batch: int, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Random windows: drawn with replacement, as of a large folder with the same mix."""
    for _ in range(count):
        yield rng.choice(shapes, batch)


def lost(dealing: Dealing, areas: np.ndarray) -> float:
    """The share of all processes' time in which they wait for the one with the most pixels."""
    shares = [sum(areas[one.places].sum() for one in process) for process in dealing.micro_batches]
    return 1 - float(areas.sum()) / (len(shares) * max(shares))


def layouts(sizes: list[tuple[int, int]], count: int, short: bool, rng: np.random.Generator) -> None:
    """Micro-steps and waiting of every layout, and what padding shapes to full micro-batches would lose instead."""
    head("B, micro-batch, P", "N", "shapes", "K, mean", "K, most", "waiting", "padded instead")
    for batch in BATCHES[:1] if short else BATCHES:
        for micro in MICRO[1:2] if short else MICRO:
            for processes in PROCESSES[:2] if short else PROCESSES:
                if batch % (micro * processes):
                    continue
                layout = BatchLayout(micro, batch // (micro * processes), processes)
                for buckets in BUCKETS[-1:] if short else BUCKETS:
                    ladder = run_shapes(buckets, RESOLUTION, DIVISOR)
                    numbers = [ladder.index(nearest(ladder, *size)) for size in sizes]
                    area, steps, waiting, padded = np.array([shape.area for shape in ladder]), [], [], []
                    for window in windows(numbers, batch, count, rng):
                        dealing = deal_by_shape(window, layout)
                        steps.append(dealing.micro_steps)
                        waiting.append(lost(dealing, area[window]))
                        full = -(-np.bincount(window) // (micro * processes)) * micro * processes
                        padded.append(1 - batch / full.sum())
                    cells = (
                        f"{np.mean(steps):.2f}",
                        str(max(steps)),
                        f"{np.mean(waiting):.1%}",
                        f"{np.mean(padded):.0%}",
                    )
                    steps_of_one = str(layout.gradient_accumulation_steps)
                    row(f"{batch}, {micro}, {processes}", steps_of_one, str(buckets), *cells)


def waiting(sizes: list[tuple[int, int]], count: int, short: bool, rng: np.random.Generator) -> None:
    """The layout whose processes wait longest, for ladders whose areas differ more and less.

    Shares have as many images each, so that none waits for more than 1 - mean / largest area. Where a share is a single
    image, as of 64 images on 64 processes, every dealing of a window waits so long in which the largest shape occurs.
    """
    columns = "shapes", "areas", "longest waiting", "at B, micro-batch, P", "1 - mean / largest area"
    head("resolution, divisor", *columns)
    everything = [
        BatchLayout(micro, batch // (micro * processes), processes)
        for batch in BATCHES
        for micro in MICRO
        for processes in (1, 2, 4, 8, 16, 32, 64)
        if batch % (micro * processes) == 0
    ]
    for (resolution, divisor), counts in LADDERS.items():
        for buckets in counts[-1:] if short else counts:
            ladder = run_shapes(buckets, resolution, divisor)
            area = np.array([shape.area for shape in ladder]) / resolution**2
            numbers = [ladder.index(nearest(ladder, *size)) for size in sizes]
            found = {}
            for layout in everything[:3] if short else everything:
                drawn = windows(numbers, layout.global_batch_size, count, rng)
                found[layout] = np.mean([lost(deal_by_shape(window, layout), area[window]) for window in drawn])
            worst = max(found, key=found.__getitem__)
            parts = worst.global_batch_size, worst.micro_batch_size, worst.num_processes
            bound = 1 - area[numbers].mean() / area[numbers].max()
            areas, at = f"{area.min():.3f} to {area.max():.3f}", ", ".join(map(str, parts))
            row(f"{resolution}, {divisor}", str(buckets), areas, f"{found[worst]:.1%}", at, f"{bound:.1%}")


def compiled(base: Path, backend: str, shapes: int) -> None:
    """A run on pictures of so many shapes, compiled, beside the same run without: weights and seconds."""
    pictures = write_shapes(base / "pictures", 27)
    found = {}
    for name in ("no", backend):
        options = {"data__buckets": SHAPES[:shapes], "data__random_flip": True}
        config = tiny_config(pictures, base / name, model__unet=UNET, **options)
        file = write_config(base / f"{name}.yaml", config)
        started = time.perf_counter()
        # Nothing that was compiled earlier, and the setting that the check of compiled gradients would find.
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"), "ACCELERATE_DYNAMO_BACKEND": name.upper()}
        with inductor.patch(layout_optimization=False):
            run_configs(1, {"float32": [file]}, base / "log", **environment)
        found[name] = time.perf_counter() - started
    apart = relative_difference(*(weights(base / name, 8) for name in found))
    head(f"8 updates on {shapes} shapes, compiled by {backend}", "seconds", "seconds without", "weights apart")
    row("UNet of 0.02 M", *(f"{found[name]:.0f}" for name in (backend, "no")), f"{apart:.1e}")


def crops(sizes: list[tuple[int, int]]) -> None:
    """What is cut off, by the number of shapes."""
    head("shapes", "cut off, mean", "cut off, most", "mean area over the square's")
    for buckets in (1, *BUCKETS):
        ladder = run_shapes(buckets, RESOLUTION, DIVISOR)
        shapes = [nearest(ladder, *size) for size in sizes]
        cut = [cropped(*size, shape) for size, shape in zip(sizes, shapes, strict=True)]
        area = np.mean([shape.area for shape in shapes]) / RESOLUTION**2
        row(str(buckets), f"{np.mean(cut):.1%}", f"{max(cut):.1%}", float(area))


def times(sizes: list[tuple[int, int]], updates: int, short: bool, rng: np.random.Generator) -> None:
    """Forward and backward of one window at a time, of many shapes and of squares, in turn."""
    layout, side = (BatchLayout(4, 2, 1), 32) if short else (BatchLayout(8, 4, 1), 64)
    network = UNet2DModel(in_channels=3, out_channels=3, **unet_config(size=side))
    ladder, square = run_shapes(BUCKETS[-1], side, 4), [Shape(side, side)]
    numbers = [ladder.index(nearest(ladder, *size)) for size in sizes]

    def seconds(dealing: Dealing, shapes: list[Shape]) -> float:
        started = time.perf_counter()
        for (one,) in zip(*dealing.micro_batches, strict=True):
            images = torch.zeros(len(one.places), 3, *shapes[one.places[0]])
            network(images, 10).sample.square().mean().backward()
        return time.perf_counter() - started

    ratios, areas, steps = [], [], []
    for window in windows(numbers, layout.global_batch_size, updates + 1, rng):
        shapes, dealing = [ladder[number] for number in window], deal_by_shape(window, layout)
        many = seconds(dealing, shapes)
        one = seconds(deal_evenly(len(window), layout), square * len(window))
        ratios.append(many / one)
        areas.append(np.mean([shape.area for shape in shapes]) / square[0].area)
        steps.append(dealing.micro_steps)
    head("UNet of 1.1 M, time an image over squares'", "measured", "mean area", "per pixel", "micro-steps")
    ratio, area = median(ratios[1:]), float(np.mean(areas[1:]))  # the first is warming up
    taken = f"{np.mean(steps[1:]):.2f} for {layout.gradient_accumulation_steps}"
    row(
        f"{side} px, {layout.global_batch_size} images in micro-batches of {layout.micro_batch_size}",
        ratio,
        area,
        ratio / area,
        taken,
    )


def noise_scale(sizes: list[tuple[int, int]], images: int, count: int, rng: np.random.Generator) -> None:
    """The noise scale by first micro-batches of one shape over that by random ones, at the same weights and windows."""
    torch.manual_seed(0)
    kind = Unconditional(UNet2DModel(**UNET), DDPMScheduler())
    ladder = run_shapes(BUCKETS[-1], 16, 2)
    shapes = [nearest(ladder, *sizes[index % len(sizes)]) for index in rng.permutation(images)]
    weights = list(kind.trainable().values())

    def gradient(index: int, shape: Shape) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(picture((shape.width, shape.height), index)).copy())[None, None]
        clean, _ = kind.inputs({"images": pixels, "noise": torch.zeros(1)})
        noise, timestep = torch.randn(clean.shape), torch.tensor([index * 617 % 1000])
        noisy = kind.noise_scheduler.add_noise(clean, noise, timestep)
        loss = loss_per_image(kind.noise_scheduler, kind.network(noisy, timestep).sample, clean, noise, timestep, None)
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss.sum(), weights)])

    gradients = torch.stack([gradient(index, shape) for index, shape in enumerate(shapes)]).double()
    products, numbers = (gradients @ gradients.T).numpy(), np.array([ladder.index(shape) for shape in shapes])

    def squared(members: np.ndarray) -> float:
        return float(products[np.ix_(members, members)].mean())

    head("noise scale, first micro-batches of one shape over random ones", "ratio", "mean small batch")
    for layout in (BatchLayout(4, 4, 1), BatchLayout(4, 2, 2), BatchLayout(8, 4, 2)):
        totals, small_batches = {"shaped": [], "random": []}, []
        for _ in range(count):
            window = rng.choice(images, layout.global_batch_size, replace=False)
            dealings = {"shaped": deal_by_shape(numbers[window], layout), "random": deal_evenly(len(window), layout)}
            for name, dealing in dealings.items():
                firsts = [window[process[0].places] for process in dealing.micro_batches]
                small = 1 / np.mean([1 / len(first) for first in firsts])
                one = GradientNoiseScale()
                one.add(float(np.mean([*map(squared, firsts)])), squared(window), small, len(window))
                totals[name].append((one.noise, one.squared_gradient))
                small_batches += [small] * (name == "shaped")
        scales = {name: np.mean(found, axis=0) for name, found in totals.items()}
        ratio = (scales["shaped"][0] / scales["shaped"][1]) / (scales["random"][0] / scales["random"][1])
        parts = layout.micro_batch_size, layout.gradient_accumulation_steps, layout.num_processes
        row(" x ".join(map(str, parts)), float(ratio), f"{np.mean(small_batches):.2f}")


def main(folder: Path | None, short: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = sizes_in(folder, rng)
    print(f"{len(sizes)} pictures; {machine()}")
    crops(sizes)
    layouts(sizes, 5 if short else 200, short, rng)
    waiting(sizes, 5 if short else 200, short, rng)
    times(sizes, 1 if short else 12, short, rng)
    noise_scale(sizes, 80 if short else 400, 20 if short else 2000, np.random.default_rng(0))


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--pictures", type=Path, metavar="FOLDER", help="a folder whose pictures' sizes are used")
    options.add_argument("--compile", action="store_true", help="only a compiled run beside the plain one")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    with FOLDER:
        if arguments.compile:
            compiled(Path(FOLDER.name), *(("eager", 2) if arguments.short else ("inductor", 3)))
        else:
            main(arguments.pictures, arguments.short)
