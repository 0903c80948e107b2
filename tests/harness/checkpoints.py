"""Checkpoints that are damaged, or have foreign files in them."""

import os
from pathlib import Path

FILES = ["ema.safetensors", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "run_state.json"]
FOREIGN = [  # the second row has names that Accelerate's `load_state` would load
    *("._model.safetensors", ".DS_Store", ".nfs000000000012c4", "Thumbs.db", "train.py"),
    *("custom_checkpoint_0.pkl", "pytorch_model.bin", "scheduler.bin", "random_states_1.pkl", "scaler.pt"),
]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def remove(file: Path) -> None:
    file.unlink()


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = [(damage, file) for damage in (truncate, empty, remove, flip_a_bit) for file in [*FILES, "manifest.json"]]
DAMAGE.remove((flip_a_bit, "manifest.json"))  # a flipped blank would leave it valid
