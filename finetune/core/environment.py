"""The environment variables of the launch, which Accelerate and torch read: each has to be what they can read.

Launchers set them right; what is wrong was exported by hand, or left over in a shell from another program.
"""

import os

import torch
from accelerate.utils import str_to_bool

from finetune.core.launcher import launch_error

_NUMBERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"),
    *("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"),
    *(f"{launcher}_{what}" for launcher in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD") for what in ("SIZE", "RANK")),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "PMI_SIZE", "PMI_RANK"),
)
_FLAGS = (
    *(f"ACCELERATE_USE_{name}" for name in ("CPU", "FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")),
    *("ACCELERATE_DEBUG_MODE", "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
)
_DEVICE = "ACCELERATE_TORCH_DEVICE"


def check_environment() -> None:
    """Find variables that would end in a traceback of the library that reads them.

    Raises:
        UserError: on every process, with a line for each variable that cannot be read on the first.
    """
    problems = [
        f"{name}: found {value!r} in the environment; expected a whole number: unset it, or start with torchrun or "
        "accelerate launch, which set it"
        for name in _NUMBERS
        if (value := os.environ.get(name)) is not None and not value.strip().removeprefix("-").isdecimal()
    ]
    problems += [
        f"{name}: found {value!r} in the environment; expected true or false: unset it, or correct it"
        for name in _FLAGS
        if (value := os.environ.get(name)) is not None and not _is_flag(value)
    ]
    if (device := os.environ.get(_DEVICE)) is not None and not _is_there(device):
        problems.append(
            f"{_DEVICE}: found {device!r} in the environment; expected a device that this machine has, such as cpu: "
            "unset it, or correct it"
        )
    if problems:
        raise launch_error(*problems)


def _is_flag(value: str) -> bool:
    try:
        str_to_bool(value)
    except ValueError:
        return False
    return True


def _is_there(name: str) -> bool:
    """Whether torch has a device; without using it, which would take its memory."""
    try:
        device = torch.device(name)
        count: int = torch.get_device_module(device.type).device_count()
    except (RuntimeError, AttributeError):  # of no kind that torch knows, or none of its own
        return False
    return (device.index or 0) < count
