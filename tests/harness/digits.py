"""The jobs on scikit-learn's handwritten digits that README promises, and who reads what they draw."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from harness.configs import ROOT
from harness.processes import finish, nothing


def run_job(config: str, output_dir: Path, *overrides: str, before: Callable[[], None] = nothing) -> None:
    """A job of configs/, whole.

    Its windows of 64 images are one micro-batch: the same run as the four of 16 in the config, in three quarters of the
    time.
    """

    def in_the_checkout() -> None:
        os.chdir(ROOT)  # the config names its base relative to it
        before()

    command = ("--config", f"configs/{config}", f"output_dir={output_dir}", "training.micro_batch_size=64", *overrides)
    finish(*command, folder=output_dir.parent, before=in_the_checkout, seconds=1200)


@cache
def _reader() -> SVC:
    digits = load_digits()
    return SVC(gamma=0.001).fit(digits.data, digits.target)


def read(pictures: np.ndarray) -> np.ndarray:
    """The digits in grey pictures (n, side, side) of 0 .. 1, read by an SVC that knows all the real ones: (n,)."""
    count, side, _ = pictures.shape
    shrunk = pictures.reshape(count, 8, side // 8, 8, side // 8).mean((2, 4))
    return _reader().predict(16 * shrunk.reshape(count, 64))  # which have 8 pixels a side, of 0 .. 16


def share_read(
    folder: Path, guidance_scale: float, each: int = 20, steps: int = 10, scheduler: type = DDIMScheduler
) -> float:
    """The share of a class-conditional pipeline's samples, `each` of every class, in which its class is read."""
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    asked = [name for name in pipeline.labels for _ in range(each)]
    options = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "output_type": "np"}
    images = pipeline(asked, generator=torch.Generator().manual_seed(1), **options).images
    return float((read(images[..., 0]) == np.array([int(name) for name in asked])).mean())
