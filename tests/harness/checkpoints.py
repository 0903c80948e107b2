"""Checkpoints that are damaged, or have foreign files in them, or are in parts."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

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


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint is of a sharded run."""
    return any(folder.glob("shard-*"))


def parts(folder: Path) -> dict[str, list[tuple[list[int], Tensor]]]:
    """The parts of every tensor of a sharded run's checkpoint, each with where it begins in the tensor."""
    found = {}
    for path in sorted(folder.glob("shard-*")):
        with safe_open(path, "pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118 - not a mapping
                found.setdefault(name, []).append((places[name]["saved_offsets"], file.get_tensor(name)))
    return found


def assembled(folder: Path, kind: str) -> dict[str, Tensor]:
    """The whole tensors of a kind (`model`, `ema`, `exp_avg`) in a sharded run's checkpoint, by name of the weight."""
    named = {name: each for name, each in parts(folder).items() if name.startswith(f"{kind}.")}
    return {
        name.removeprefix(f"{kind}."): torch.cat([part for _, part in sorted(each, key=lambda one: one[0])])
        if each[0][0]
        else each[0][1]
        for name, each in named.items()
    }
