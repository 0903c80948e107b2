"""What the trainer is measured against: a loop of nothing but forward, backward, optimizer and moving average.

What is compared takes turns, update by update, in one process: other load on the machine slows both alike, and the
ratio holds.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from environment import FOLDER

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from finetune.config.schema import Config
from finetune.run.run import Run
from harness.configs import KINDS, tiny_config, write_pictures
from harness.in_process import train_here


def unet_config(channels: tuple[int, ...] = (32, 64, 64), size: int = 32) -> dict:
    """A UNet with attention at its lowest resolution: 1.1 M parameters as it is, 6.5 M with (64, 128, 176)."""
    levels = len(channels) - 1
    return {
        "sample_size": size,
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * levels + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * levels,
    }


def named(unet: UNet2DModel) -> str:
    """A network by its size, for a row's first cell."""
    millions = sum(weight.numel() for weight in unet.parameters()) / 1e6
    return f"UNet of {millions:.2g} M at {unet.config.sample_size} px"


def run_config(name: str, unet: dict, images: int, kind: str = "unconditional", **changes) -> Config:
    """A run on grey pictures in a folder of its own, with all that the trainer does: EMA, logging, TensorBoard."""
    size, folder = unet["sample_size"], Path(FOLDER.name, f"pictures-{kind}-{unet['sample_size']}-{images}")
    if not folder.exists():
        write_pictures(folder, images, (size, size), kind)
    options = {"model__unet": unet, "model__noise_scheduler": {}, "logging__tracker": "tensorboard"}
    options |= KINDS[kind] | changes
    return Config.model_validate(tiny_config(folder, Path(FOLDER.name, name), **options))


class BareLoop:
    """Updates of `steps` micro-batches on noise in memory, with the optimizer and the average of train.py."""

    def __init__(self, unet: UNet2DModel, micro_batch_size: int, steps: int = 1):
        self.unet, self.steps = unet, steps
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
        self.ema = EMAModel(unet.parameters(), foreach=True)
        shape = (micro_batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.noisy, self.noise = torch.randn(shape), torch.randn(shape)
        self.timesteps = torch.randint(0, 1000, (micro_batch_size,))
        classes = unet.config.num_class_embeds
        self.told = {} if classes is None else {"class_labels": torch.randint(0, classes, (micro_batch_size,))}

    def update(self) -> None:
        for _ in range(self.steps):
            prediction = self.unet(self.noisy, self.timesteps, **self.told).sample
            (torch.nn.functional.mse_loss(prediction, self.noise) / self.steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


class _MeasuredError(BaseException):
    """Ends a run that was measured; nothing in the trainer catches it."""


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def beside_the_trainer(config: Config, other: Callable[[], object], updates: int) -> list[tuple[float, float]]:
    """(seconds of an update of train.main, seconds of `other`), in turns; the first two of each are left out.

    An update is timed from one return of `Run.evaluate` to the next: everything that the loop does.
    """
    found, evaluate, since = [], Run.evaluate, None

    def taking_turns(run: Run) -> None:
        nonlocal since
        evaluate(run)
        trainer = None if since is None else time.perf_counter() - since
        turn = seconds(other)
        if trainer is not None:
            found.append((trainer, turn))
        if len(found) == updates + 2:
            raise _MeasuredError
        run.clock.skip()
        since = time.perf_counter()

    Run.evaluate = taking_turns
    try:
        train_here(config)
    except _MeasuredError:
        pass
    finally:
        Run.evaluate = evaluate
    return found[2:]


def in_turns(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """(seconds of one, seconds of the other), after each has been done once."""
    one(), other()
    return [(seconds(one), seconds(other)) for _ in range(rounds)]


def ratio(pairs: list[tuple[float, float]]) -> float:
    """The median of the pairs' ratios; other load on the machine spoils single pairs, not the median."""
    return median(one / other for one, other in pairs)


def milliseconds(pairs: list[tuple[float, float]]) -> str:
    """The medians of both."""
    return " : ".join(f"{1000 * median(times):.0f}" for times in zip(*pairs, strict=True)) + " ms"
