"""Class-conditional training on the digits: accuracy by guidance scale, the start of the embedding, quality over a run.

python tests/benchmarks/classes.py            # about 25 minutes on a CPU core
python tests/benchmarks/classes.py --short    # few updates and images: a smoke test
"""

from collections.abc import Callable
from pathlib import Path

from environment import FOLDER, parser

import numpy as np
import torch
import yaml
from diffusers import DDIMScheduler
from sklearn.datasets import load_digits
from table import head, row
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from finetune.evaluation.quality import Features, feature_distances
from finetune.models import classes
from harness.compare import history
from harness.configs import ROOT
from harness.digits import share_read
from harness.processes import finish, nothing

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
OVERRIDES = [f"model.pretrained={ROOT / 'configs/digits-base'}"]


class ClippedWithoutItsNoise(DDIMScheduler):
    """DDIM as pipelines call it by default: the image is clipped, the noise is that of the image before."""

    def step(self, output, timestep, sample):
        return super().step(output, timestep, sample)


def train(name: str, updates: int, *overrides: str, before: Callable[[], None] = nothing) -> Path:
    """A run of configs/digits-classes.yaml without sample grids; returns its folder."""
    folder = Path(FOLDER.name, name)
    finish(
        *("--config", ROOT / "configs/digits-classes.yaml", f"output_dir={folder}", "samples.count=0"),
        *(f"training.max_train_steps={updates}", *OVERRIDES, *overrides),
        folder=Path(FOLDER.name),
        before=before,
        seconds=900,
    )
    return folder


def zero_rows() -> None:
    classes.noise = lambda seed, epoch, position, shape, purpose: torch.zeros(shape)


def trained_resnet(folder: Path, epochs: int) -> str:
    """A small ResNet that reads the digits, in the format of transformers."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    network = ResNetForImageClassification(config)
    optimizer, digits = torch.optim.AdamW(network.parameters(), lr=3e-3), load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat_interleave(2, 2).repeat_interleave(2, 3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            loss = network(pixel_values=images[chosen] / 8 - 1, labels=torch.tensor(digits.target)[chosen]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return saved(network, folder)


def untrained_vit(folder: Path) -> str:
    """A network of another architecture, with random weights: any features order pictures to some extent."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return saved(ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, num_channels=1)), folder)


def in_place_of_samples(features: str, draws: int) -> tuple[float, float]:
    """Mean and deviation of the kernel distance between 200 digits and 200 others of the same classes."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8).repeat(2, 1).repeat(2, 2)[..., None]
    known, generator, found = Features(features).of(pixels), np.random.default_rng(0), []
    for _ in range(draws):
        order = generator.permutation(len(pixels))
        real, rest = order[:200], order[200:]
        spare = {label: iter(rest[digits.target[rest] == label]) for label in range(10)}
        others = [next(spare[label]) for label in digits.target[real]]
        found.append(feature_distances(known[real], known[others])["kernel_distance"])
    return float(np.mean(found)), float(np.std(found))


def saved(network: PreTrainedModel, folder: Path) -> str:
    """Save a network for grey images of 16 pixels a side with its image processor; returns the folder's name."""
    network.eval().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False).save_pretrained(folder)
    return str(folder)


def main(short: bool) -> None:
    if short:
        OVERRIDES.extend(["validation.images=8", "training.global_batch_size=16"])
    each, images, steps = (2, 20, 2) if short else (20, 200, 40)
    updates, early, draws = (4, 2, 4) if short else (300, 100, 20)

    head("guidance scale", "requested digit read", "with the noise of the unclipped image")
    trained = train("whole", updates)
    for scale in SCALES[:1] if short else SCALES:
        found = (
            share_read(trained / "pipeline", scale, each, steps, how) for how in (DDIMScheduler, ClippedWithoutItsNoise)
        )
        row(str(scale), *(f"{share:.1%}" for share in found))

    unet = yaml.safe_load((ROOT / "configs/digits-base.yaml").read_text())["model"]
    scratch = [f"model.{key}={value}" for key, value in (unet | {"pretrained": "null"}).items()]
    starts = {
        "from the base, class rows N(0, 1)": train("normal", early),
        "from the base, all rows zero": train("zero", early, before=zero_rows),
        "from scratch": train("scratch", early, *scratch),
    }
    head(f"start, {early} updates", "requested digit read at scale 2", "last training loss, smoothed")
    for name, folder in starts.items():
        loss = [line["train/loss_smoothed"] for line in history(folder) if "train/loss_smoothed" in line][-1]
        row(name, f"{share_read(folder / 'pipeline', 2.0, each, steps):.1%}", f"{loss:.4f}")

    resnet, vit = (
        trained_resnet(Path(FOLDER.name, "resnet"), 1 if short else 12),
        untrained_vit(Path(FOLDER.name, "vit")),
    )
    head("real digits in place of samples, ResNet", "kernel distance, mean", "deviation")
    row(f"{draws} draws", *(f"{value:.3f}" for value in in_place_of_samples(resnet, draws)))
    measured = [
        ("from the base, scale 1", resnet, 1.0, []),
        ("from scratch, scale 1, a ViT", vit, 1.0, scratch),
        ("from scratch, scale 1", resnet, 1.0, scratch),
        ("from the base, scale 2", resnet, 2.0, []),
    ]
    curves = {}
    for name, features, scale, overrides in measured[:2] if short else measured:
        quality = f"validation.quality={{features: {features}, images: {images}, every_steps: {max(updates // 4, 1)}}}"
        sampled = "data.validation_fraction=0.2", f"samples.guidance_scale={scale}"
        sampled += ("samples.inference_steps=2",) if short else ()
        folder = train(f"quality {name}", updates, quality, *sampled, *overrides)
        curves[name] = [line for line in history(folder) if "validation/kernel_distance" in line]
    head("update", *(f"{name}: {what}" for name in curves for what in ("FD", "KID")))
    for lines in zip(*curves.values(), strict=True):
        distances = [(line["validation/frechet_distance"], line["validation/kernel_distance"]) for line in lines]
        row(str(lines[0]["step"]), *(f"{distance:.4f}" for pair in distances for distance in pair))


if __name__ == "__main__":
    with FOLDER:
        main(parser(__doc__).parse_args().short)
