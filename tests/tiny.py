"""Runs that take a second: pictures of eight pixels a side and a network of some six thousand weights."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

ROOT = Path(__file__).parent.parent
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


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Grey PNGs, each of one random gradient, so that no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        across, down = rng.uniform(-1, 1, 2)
        x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
        pixels = 127.5 + 120 * (across * x + down * y) / 2
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{index:04}.png")
    return folder


def tiny_config(pictures: Path, output_dir: Path, **changes: Any) -> dict:
    """A run config as a mapping; `changes` are keys with `__` for the dot: `training__num_epochs=3`."""
    config = {
        "output_dir": str(output_dir),
        "seed": 3,
        "model": {"unet": UNET, "noise_scheduler": {"num_train_timesteps": 100}},
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


def write_config(file: Path, config: dict) -> Path:
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def forget_processes() -> None:
    """Accelerate keeps its state for the life of a process; the next run in this one starts without."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def run_here(config: dict, file: Path, *overrides: str, check: bool = False) -> int:
    """train.main in this process; returns its exit code."""
    import train
    from finetune.config import load_config

    forget_processes()
    try:
        return train.main(load_config(write_config(file, config), overrides), check)
    finally:
        forget_processes()


_last_start = [0]


def run_in_child(config: dict, file: Path, before: Callable[[], None] = lambda: None) -> int:
    """train.main in a forked process that has all imports done; returns its pid. `before` runs in the child."""
    import train  # noqa: F401 - before the fork, or every child would take seconds over it

    while int(time.time()) == _last_start[0]:  # TensorBoard reads event files in the order of their second
        time.sleep(0.02)
    _last_start[0] = int(time.time())
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        before()
        code = run_here(config, file)
    finally:
        threading._shutdown()  # as an interpreter that ends waits for its threads
        os._exit(code)


def curves(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: (step, value) of every scalar, but for those that tell the time."""
    events = EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "train/images_per_second"))]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def timeless(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what tells the time."""
    timed = ("time/", "train/images_per_second")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in history(output_dir)]


def differing(one: Path, other: Path, step: int) -> list[str]:
    """In what two runs are not the same to the last bit: weights, averages, curves, numbers."""
    found = []
    for part in ("model", "ema"):
        expected, seen = weights(one, step, part), weights(other, step, part)
        if expected.keys() != seen.keys() or not all(torch.equal(expected[name], seen[name]) for name in expected):
            found.append(part)
    return found + [kind.__name__ for kind in (curves, timeless) if kind(one) != kind(other)]


def stop_after_updates(count: int) -> None:
    """The next run in this process is told to stop in its count-th update, as by a signal (with no evaluations due)."""
    from finetune.stopping import StopRequest

    asked = []

    def requested(self) -> bool:
        asked.append(1)
        return len(asked) >= count

    StopRequest.requested = requested


def let_run() -> None:
    """Undo `stop_after_updates`."""
    from finetune.stopping import StopRequest

    StopRequest.requested = lambda self: self.signal is not None


def leave_out_the_export() -> None:
    """Further runs in this process end with their last checkpoint, without pipeline and loss curve."""
    from finetune import model, pictures

    model.save_pipeline = pictures.loss_curve = lambda *arguments: None


def launch(
    *arguments: str | Path,
    processes: int = 1,
    script: str = "train.py",
    config_file: str | None = None,
    mixed_precision: str = "no",
    launcher: Sequence[str] = (),
    **environment: str,
) -> subprocess.CompletedProcess:
    """`accelerate launch` of a script, with real processes, on the CPU; output as text.

    Args:
        config_file: launch as this file says; else with `processes`, `mixed_precision` and the `launcher`'s flags.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config_file is not None:
        command += ["--config_file", str(ROOT / config_file)]
    else:
        command += ["--num_machines", "1", "--num_processes", str(processes)]
        command += ["--mixed_precision", mixed_precision, *launcher]
        command += ["--multi_gpu"] if processes > 1 else ["--quiet"]
    command += [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def weights(output_dir: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    """Weights of a checkpoint: `model`, or `ema`."""
    return load_file(output_dir / f"checkpoint-{step}" / f"{part}.safetensors")


def history(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
