"""What the trainer is measured against: a loop of nothing but forward, backward, optimizer and moving average.

The benchmarks import this. Two things that are compared take turns, update by update, in one process: what else the
machine is doing then slows both, and the ratio holds.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FOLDER = tempfile.TemporaryDirectory(prefix="finetune-benchmark-")
os.environ |= {"HF_HOME": FOLDER.name, "HF_DATASETS_CACHE": f"{FOLDER.name}/datasets", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_USE_CPU": "true"}

import torch  # noqa: E402
from diffusers import UNet2DModel  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402

import train  # noqa: E402
from finetune.config import Config  # noqa: E402
from finetune.run import Run  # noqa: E402
from tiny import forget_processes, tiny_config, write_pictures  # noqa: E402


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


def run_config(name: str, unet: dict, images: int, **changes) -> Config:
    """A run of its own on some grey pictures, with nothing of the trainer's daily work left out."""
    size, folder = unet["sample_size"], Path(FOLDER.name, f"pictures-{unet['sample_size']}-{images}")
    if not folder.exists():
        write_pictures(folder, images, (size, size))
    options = {"model__unet": unet, "model__noise_scheduler": {}, "logging__tracker": "tensorboard"} | changes
    return Config.model_validate(tiny_config(folder, Path(FOLDER.name, name), **options))


class BareLoop:
    """Updates of `steps` micro-batches, on noise that is already in memory."""

    def __init__(self, unet: UNet2DModel, micro_batch_size: int, steps: int = 1):
        self.unet, self.steps = unet, steps
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
        self.ema = EMAModel(unet.parameters(), foreach=True)
        shape = (micro_batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.noisy, self.noise = torch.randn(shape), torch.randn(shape)
        self.timesteps = torch.randint(0, 1000, (micro_batch_size,))

    def update(self) -> None:
        for _ in range(self.steps):
            prediction = self.unet(self.noisy, self.timesteps).sample
            (torch.nn.functional.mse_loss(prediction, self.noise) / self.steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())


class _EnoughError(BaseException):
    """Ends a run from outside; no one catches it."""


class _Terminal(io.StringIO):
    """What a progress bar takes for a terminal, and therefore draws itself on as often as it ever does."""

    def isatty(self) -> bool:
        return True


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def beside_the_trainer(config: Config, other: Callable[[], object], updates: int) -> list[tuple[float, float]]:
    """(seconds of an update of train.main, seconds of `other`), in turns; the first two of each are left out.

    An update counts from the return of `run.evaluate` to its next return, which is all that the loop does.
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
            raise _EnoughError
        run.clock.skip()
        since = time.perf_counter()

    Run.evaluate = taking_turns
    forget_processes()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(_Terminal()):
            train.main(config)
    except _EnoughError:
        pass
    finally:
        Run.evaluate = evaluate
        forget_processes()
    return found[2:]


def in_turns(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """(seconds of one, seconds of the other), each done once before."""
    one(), other()
    return [(seconds(one), seconds(other)) for _ in range(rounds)]


def ratio(pairs: list[tuple[float, float]]) -> float:
    """The median of the pairs' ratios: another program that gets in between spoils single pairs, not the median."""
    return median(one / other for one, other in pairs)


def row(what: str, measured: str, found: float | None = None, limit: str = "") -> None:
    """A line of the table, at once."""
    print(f"| {what} | {measured} | {'' if found is None else f'{found:.3f}'} | {limit} |", flush=True)


def head(title: str) -> None:
    threads = f"{torch.get_num_threads()} thread(s)"
    print(f"\n| {title}, {threads} | measured | ratio | limit |\n|---|---|---|---|", flush=True)
