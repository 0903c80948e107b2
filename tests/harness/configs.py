"""Runs that take a second: pictures of eight pixels a side and a network of some ten thousand weights."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# Residual blocks in the middle alone, which take the timestep and the class: for runs about all but the network.
SMALL = UNET | {"layers_per_block": 0, "add_attention": False}
# Down by a convolution and up again, whatever the timestep: what compiles in the shortest time.
SMALLEST = SMALL | {"mid_block_type": None}


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A grey picture of one random gradient; another seed is another picture."""
    across, down = np.random.default_rng(seed).uniform(-1, 1, 2)
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    return Image.fromarray((127.5 + 120 * (across * x + down * y) / 2).round().astype(np.uint8))


def png(size: tuple[int, int] = (8, 8), seed: int = 0) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture(size, seed).save(file, "PNG")
    return file.getvalue()


KINDS = {  # changes that make a run one of each kind of model
    "unconditional": {},
    "classes": {"model__class_conditional": True, "training__condition_dropout": 0.3},
    "text": {"training__condition_dropout": 0.3},
    "sdxl": {"training__condition_dropout": 0.3},
    "lora": {"model__lora": {"rank": 2, "alpha": 3.0}, "training__condition_dropout": 0.3},
}
PIPELINES = {
    "text": {},
    "sdxl": {"xl": True},
    "lora": {"xl": True},
}  # of the kinds that are trained from a pipeline's folder
CLASSES = ("cat", "dog", "emu")


def crop_of(kind: str) -> str:
    """Random for models of pixels, and the centre where images are encoded before training."""
    return "center" if kind in PIPELINES else "random"


def of_kind(kind: str, pictures: Path, whole: bool = False) -> dict[str, Any]:
    """Changes that make a run one of a kind of model; its pipeline, if it has one, is saved beside the pictures.

    Args:
        whole: with layers in every block of the network, and not in the middle alone.
    """
    if kind not in PIPELINES:
        return KINDS[kind] | ({"model__unet": UNET} if whole else {})
    from harness import pipelines

    unet = {} if whole else pipelines.SMALL
    folder = pipelines.save_pipeline(pictures.with_name(f"{pictures.name}-{kind}"), unet=unet, **PIPELINES[kind])
    return {"model": {"pretrained": folder}, **KINDS[kind]}


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (8, 8), kind: str = "unconditional") -> Path:
    """`count` different grey PNG files; for a model of classes in a folder for each class in turn, for one of texts
    beside their captions."""
    for index in range(count):
        name = CLASSES[index % len(CLASSES)]
        home = folder / name if kind == "classes" else folder
        home.mkdir(parents=True, exist_ok=True)
        picture(size, index).save(home / f"{index:04}.png")
        if kind in PIPELINES:
            write_caption(home, index)
    return folder


def write_caption(folder: Path, index: int) -> None:
    """A caption of a picture beside it; of every third picture two."""
    name = CLASSES[index % len(CLASSES)]
    (folder / f"{index:04}.txt").write_text(f"a {name}\n" + ("an emu\n" if index % 3 == 2 else ""))


def tiny_config(pictures: Path, output_dir: Path, **changes: Any) -> dict:
    """A run config as a mapping; `changes` are keys with `__` for the dot: `training__num_epochs=3`."""
    config = {
        "output_dir": str(output_dir),
        "seed": 3,
        "model": {"unet": SMALL, "noise_scheduler": {"num_train_timesteps": 100}},
        "data": {"source": str(pictures), "num_workers": 0, "validation_fraction": 0.0},
        "training": {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 2},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1000},
        "validation": {"every_steps": 1000, "images": 4},
        "samples": {"count": 0, "inference_steps": 2},
        "logging": {"tracker": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            config.setdefault(section, {})[name] = value
        else:
            config[section] = value
    return config


def write_endless(base: Path) -> Path:
    """The file of a run without an end, with a checkpoint where it is stopped and a data worker for each process, which
    signals reach too."""
    config = tiny_config(
        write_pictures(base / "pictures", 16),
        base / "run",
        data__num_workers=1,
        training={"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 100_000},
    )
    return write_config(base / "config.yaml", config)


EVALUATED_STEPS = 6  # of 19 pictures, 2 of them held out, in windows of 8: 8 + 8 + 1, twice


def evaluated_config(pictures: Path, output_dir: Path, **changes: Any) -> dict:
    """A run with everything that happens between updates: checkpoints, pruning, validation, samples, TensorBoard."""
    options = {
        "data__validation_fraction": 0.1,
        "checkpoint": {"every_steps": 2, "keep": 2},
        "validation": {"every_steps": 3, "images": 4},
        "samples": {"every_steps": 3, "count": 2, "inference_steps": 2},
        "logging__tracker": "tensorboard",
    }
    return tiny_config(pictures, output_dir, **options | changes)


def write_config(file: Path, config: dict) -> Path:
    """The config as a YAML file; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file
