"""What fits into memory: what a run will need, and the largest micro-batch that the hardware can hold."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import UNet2DModel

from finetune.config import TrainingConfig, micro_batch_candidates, plan_batch
from finetune.errors import UserError
from finetune.windows import Split

Answer = TypeVar("Answer")
LESS_PER_IMAGE = "a smaller data.resolution, model.gradient_checkpointing, or mixed precision"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it was memory that ran out, as torch and its libraries say so.

    What Accelerate knows, and two more of a CPU: C++'s bad_alloc, and oneDNN, which has one sentence for all that it
    could not set up. That memory was the reason then is the likeliest in a network that has worked before.
    """
    onednn = isinstance(error, RuntimeError) and "could not create a primitive" in str(error)
    return isinstance(error, MemoryError) or onednn or should_reduce_batch_size(error)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take on a CPU: what the machine has free, and what its control groups leave.

    A container's or a batch job's limit is known to its control group alone; who goes beyond it is killed.

    Args:
        root: what the paths of /proc and /sys begin with.
    """
    free, own = psutil.virtual_memory().available, root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        version2 = not controllers
        if not version2 and "memory" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("" if version2 else "memory")
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):  # a group lives within the limits of those above it
            if folder.is_relative_to(tree):
                free = min(free, _left_in_group(folder, version2))
    return max(int(free), 0)


def _left_in_group(folder: Path, version2: bool) -> float:
    """Bytes below a control group's limit. Pages of files not used lately are given back, and do not count."""
    limit, usage, inactive = (
        ("memory.max", "memory.current", "inactive_file")
        if version2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return float("inf") if allowed == "max" else int(allowed) - used + int(statistics.get(inactive, 0))
    except OSError:  # the root has no limit; a container does not see the groups above its own
        return float("inf")


def weight_bytes(unet: UNet2DModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())


def state_bytes(unet: UNet2DModel, averaged: bool) -> int:
    """Bytes that training holds throughout: weights, gradients, AdamW's two moments, and the moving average."""
    return (5 if averaged else 4) * weight_bytes(unet)


def activation_bytes(unet: UNet2DModel) -> int:
    """Bytes that autograd keeps of one image between forward and backward, measured by a forward pass of one image.

    Under mixed precision about half of it; with gradient checkpointing only what is kept between the blocks.
    """
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(unet, 1).sum()
    return sum(kept.values())


def _forward(unet: UNet2DModel, count: int) -> torch.Tensor:
    config, weight = unet.config, next(unet.parameters())
    images = weight.new_zeros(count, config.in_channels, config.sample_size, config.sample_size)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):  # dropout draws
        return unet(images, torch.zeros(count, dtype=torch.long, device=weight.device)).sample


def memory_plan(unet: UNet2DModel, micro_batch_size: int, averaged: bool) -> str:
    """What training will hold in memory, for a person to compare with what there is."""
    state, image = state_bytes(unet, averaged) / 1e6, activation_bytes(unet) / 1e6
    return (
        f"Memory: {state:.0f} MB of weights, gradients, optimizer and average, and {image:.1f} MB of activations an "
        f"image: about {state + micro_batch_size * image:.0f} MB a process with micro-batches of {micro_batch_size}"
    )


def first_split(training: TrainingConfig, num_processes: int) -> Split:
    """The split that the config asks for; for `auto`, the whole share of a process at once, to be tried."""
    largest = None
    if training.micro_batch_size == "auto":
        largest = micro_batch_candidates(training.global_batch_size, num_processes)[0]
    _, micro_batch_size, accumulation_steps = plan_batch(training, num_processes, largest)
    return Split(micro_batch_size, accumulation_steps, num_processes)


def smaller_splits(split: Split) -> list[Split]:
    """The same window in ever smaller micro-batches, from this split on."""
    share = split.micro_batch_size * split.gradient_accumulation_steps
    sizes = micro_batch_candidates(share, 1)
    return [Split(size, share // size, split.num_processes) for size in sizes if size <= split.micro_batch_size]


def largest_split(accelerator: Accelerator, unet: UNet2DModel, split: Split) -> Split:
    """The split of the largest micro-batch with which every process can go forward and backward, gradients and all.

    Tried beside as much memory as AdamW will hold, on the bare network: neither weights nor other processes notice. On
    a CPU, where memory that is promised too freely ends in a killed process, only sizes are tried that what is free
    allows by measure.

    Args:
        unet: on its device, the moving average already beside it.
        split: the largest to be tried.

    Raises:
        UserError: if not even single images fit.
    """
    most = _within_memory(lambda: _most_by_measure(accelerator, unet)) or 0
    for candidate in smaller_splits(split):
        # One answer for all: each process has its own memory, and measured what is free at its own moment.
        size = candidate.micro_batch_size
        fits = (size <= most or size == 1) and _within_memory(lambda size=size: _try(accelerator, unet, size))
        if all(gather_object([fits])):
            return candidate
    raise UserError(
        f"training.micro_batch_size: auto: not even single images fit into the memory of {accelerator.device}; use "
        f"{LESS_PER_IMAGE}"
    )


def _most_by_measure(accelerator: Accelerator, unet: UNet2DModel) -> float:
    """Images that the free memory of a CPU holds."""
    if accelerator.device.type != "cpu":
        return float("inf")
    room = free_memory() / accelerator.num_processes - state_bytes(unet, averaged=False)
    return 0.8 * room / activation_bytes(unet)


def _try(accelerator: Accelerator, unet: UNet2DModel, size: int) -> bool:
    """Go forward and backward with so many images; true, if it comes to an end."""
    try:
        moments = [torch.empty_like(parameter) for parameter in unet.parameters() for _ in range(2)]
        for _ in range(2):  # the second pass finds the first one's gradients in memory
            with accelerator.autocast():
                loss = _forward(unet, size).square().mean()
            loss.backward()
        del moments, loss
        return True
    finally:
        unet.zero_grad(set_to_none=True)


def _within_memory(attempt: Callable[[], Answer]) -> Answer | None:
    """What an attempt comes to; None if memory ran out on it."""
    try:
        return attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        clear_device_cache(garbage_collection=True)
