"""How much memory training takes at its peak: with the batch, with gradient checkpointing, with a save.

    python tests/benchmarks/memory.py            # about two minutes on two CPU cores
    python tests/benchmarks/memory.py --short    # the smallest of sizes: does it run

Each figure is the peak resident memory of a process of its own, from `wait4`.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from bare import FOLDER, ROOT, head, row, run_config, unet_config

from tiny import write_config


def peak(name: str, unet: dict, images: int = 8, killed_after: int | None = None, **changes) -> float:
    """MB at the peak of a run of train.py on one thread, to its end or to an update."""
    options = {"checkpoint__every_steps": 1000, "ema__enabled": False, "logging__tracker": None} | changes
    config = run_config(name, unet, images, training__num_epochs=None, **options)
    file = write_config(Path(FOLDER.name, f"{name}.yaml"), config.model_dump(mode="json", exclude_defaults=True))
    log = Path(config.output_dir, "metrics.jsonl")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(file)]
    # Freed memory goes back at once, so that the peak is what was used.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if killed_after is not None:
            while not (log.exists() and len(log.read_text().splitlines()) >= killed_after):
                time.sleep(0.01)
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, -signal.SIGKILL), f"{name}: exit code {process.returncode}"
    return usage.ru_maxrss * 1024 / 1e6


def of(micro_batch_size: int, steps: int = 1, updates: int = 2) -> dict:
    return {
        "training__micro_batch_size": micro_batch_size,
        "training__gradient_accumulation_steps": steps,
        "training__max_train_steps": updates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the smallest of sizes, to see that it runs")
    short = parser.parse_args().short
    torch.set_num_threads(1)
    head("peak memory")
    unet, batch = unet_config((8, 16)) if short else unet_config(), 16 if short else 256
    small, large = peak("small", unet, 256, **of(4)), peak("large", unet, 256, **of(4, batch // 4))
    row(f"global batch {batch} over 4, micro-batches of 4", f"{large:.0f} : {small:.0f} MB", large / small, "1.05")
    micro = 4 if short else 32
    plain = peak("plain", unet, micro, **of(micro))
    again = peak("again", unet | {"sample_size": 32}, micro, model__gradient_checkpointing=True, **of(micro))
    row(f"gradient_checkpointing, micro-batch of {micro}", f"{again:.0f} : {plain:.0f} MB", again / plain)
    unet = unet_config((8, 16), 8) if short else unet_config((128, 256, 352), 8)
    without = peak("unsaved", unet, **of(1, updates=1000), killed_after=3)
    saving = peak("saved", unet, **of(1, updates=1000), killed_after=3, checkpoint__every_steps=1)
    row("saves, or none", f"{saving:.0f} : {without:.0f} MB", saving / without)


if __name__ == "__main__":
    with FOLDER:
        main()
