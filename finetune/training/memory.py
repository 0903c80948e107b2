"""What fits into memory: what a run will need, and the largest micro-batch that the hardware can hold.

Both are measured by trial updates. A process takes more than its weights and activations: libraries, the kernels'
workspaces, and what the C allocator cannot reuse.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from finetune.core.batch import BatchLayout
from finetune.core.distributed import all_agree, printed_once, together
from finetune.core.errors import UserError
from finetune.core.failures import is_out_of_memory
from finetune.core.hosts import processes_here
from finetune.core.kind import Kind
from finetune.core.sharding import gathered_bytes, held_bytes, is_sharded
from finetune.training.host_memory import forget_peak, free_memory, peak_memory, resident_memory
from finetune.training.trial_pass import activation_bytes, forward, inputs, unchanged

T = TypeVar("T")
LESS_PER_IMAGE = "a smaller data.resolution, model.gradient_checkpointing, or mixed precision"
_PASSES = 2  # of a trial update: the second finds the first one's gradients in memory


def weight_bytes(kind: Kind) -> int:
    """Bytes that a process holds of the trainable parameters."""
    return held_bytes(kind.trainable().values())


def state_bytes(network: torch.nn.Module, averaged: bool, crop_encoder: torch.nn.Module | None = None) -> int:
    """Bytes that a process holds throughout: weights, gradients, AdamW's two moments, and the moving average.

    Frozen weights count once: they have neither gradients nor moments. Of a sharded network a process holds its part.
    """
    more = 4 if averaged else 3
    weights = [*network.parameters(), *(() if crop_encoder is None else crop_encoder.parameters())]
    return sum(held_bytes([each]) * (1 + more * each.requires_grad) for each in weights)


def state_parts(averaged: bool) -> str:
    """What `state_bytes` counts, as words of a message."""
    return f"weights, gradients{', optimizer state and EMA weights' if averaged else ' and optimizer state'}"


def state_plan(
    accelerator: Accelerator,
    outline: torch.nn.Module,
    num_processes: int,
    averaged: bool,
    shard: bool = False,
    crop_encoder: torch.nn.Module | None = None,
) -> str:
    """What training will hold throughout, as a line to print before any of it is allocated. Called by all processes.

    Args:
        outline: the network on the meta device.
        num_processes: of the run.
        shard: each of them holds its share; while the network is loaded, on the CPU, each holds all of its weights.
        crop_encoder: what encodes random crops, on the meta device; each process holds all of it.

    Raises:
        UserError: if that alone is more than is free.
    """
    shares, device, here = num_processes if shard else 1, accelerator.device, processes_here()
    state, held = -(-state_bytes(outline, averaged) // shares), state_parts(averaged)
    if crop_encoder is not None:
        state, held = state + held_bytes(crop_encoder.parameters()), f"{held}, and the encoder of random crops,"
    most, free = state, float("inf")
    if device.type == "cpu":
        most, free = max(state, held_bytes(outline.parameters())), free_memory() / here
    elif device.type in ("cuda", "xpu"):
        free = torch.accelerator.get_memory_info(device)[0]
    parameters = sum(parameter.numel() for parameter in outline.parameters())
    if most > free:
        raise UserError(
            f"model: found {parameters / 1e6:.2f} M parameters, whose {held} take "
            f"{most / 1e6:,.0f} MB a process, and {free / 1e6:,.0f} MB free on {device}; choose a smaller model, or a "
            "machine with more memory"
        )
    return (
        f"Model: {parameters / 1e6:.2f} M parameters; {held} will take "
        f"{state / 1e6:,.0f} MB a process{f', 1/{shares} of the total' if shares > 1 else ''} (--check measures the "
        "rest)"
    )


class Trials:
    """Trial updates of one process, and what they take of its memory.

    An update goes forward and backward with gradients and AdamW's moments in memory, on the unwrapped network: no
    gradients are reduced, and weights, gradients, buffers and generators stay as they were.
    """

    def __init__(self, accelerator: Accelerator, kind: Kind, here: int, averaged: bool):
        """To be made when the network is on its device, and the moving average, if there is one, beside it.

        Args:
            here: processes that share the memory of this host.
        """
        self.accelerator, self.kind, self.averaged = accelerator, kind, averaged
        self.device = accelerator.device
        self.on_cpu = self.device.type == "cpu"
        if kind.crop_encoder is not None:
            _within_memory(lambda: inputs(kind, 1))  # loads the encoder, which is held throughout like the network
        self.earlier_peak = forget_peak()
        if self.device.type in ("cuda", "xpu"):
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(self.device)
        self.resident = resident_memory()
        self.free = free_memory() / here if self.on_cpu else float("inf")
        self.gathered = gathered_bytes(kind.network)
        self.per_image = 0.0  # bytes, by the largest trial so far

    def needed(self, size: int) -> float:
        """Bytes that an update of so many images takes, on top of what is held without it."""
        return 3 * weight_bytes(self.kind) + self.gathered + size * max(self.per_image, self.activations)

    @cached_property
    def activations(self) -> int:
        return activation_bytes(self.kind)

    def fits(self, size: int) -> bool:
        """Whether an update of so many images completes.

        Linux overcommits memory on a CPU and kills the process that uses it, so an update is not tried there if it
        would need more than is free: estimated from one image's activations, later from the largest
        trial.
        """
        return bool(_within_memory(lambda: self._may_be_tried(size) and self._complete(size)))

    def _may_be_tried(self, size: int) -> bool:
        fits = self._fits_the_free_memory(size)
        return all_agree(fits) if is_sharded(self.kind.network) else fits  # a forward pass needs all processes

    def _fits_the_free_memory(self, size: int) -> bool:
        return not self.on_cpu or size == 1 or self.needed(size) <= self.free

    def _complete(self, size: int) -> bool:
        parameters = list(self.kind.trainable().values())
        with unchanged(self.kind):
            moments = [torch.ones_like(parameter) for parameter in parameters for _ in range(2)]  # zeros take no memory
            for _ in range(_PASSES):
                with self.accelerator.autocast():
                    loss = forward(self.kind, size).square().mean()
                loss.backward()
            del loss
            if self.averaged:  # to evaluate the average takes a copy of the weights
                copies = [parameter.detach().clone() for parameter in parameters]
                del copies
            del moments
        if self.on_cpu:
            held = 3 * weight_bytes(self.kind) + self.gathered
            self.per_image = (peak_memory() - self.resident - held) / size
        return True

    def shortage(self, size: int) -> str:
        """Why an update of so many images was not tried, as part of an error; empty if it was."""
        if not self.per_image or self._fits_the_free_memory(size):
            return ""
        return (
            f": expected about {self.needed(size) / 1e6:.0f} MB beside the network, found {self.free / 1e6:.0f} MB free"
        )

    def peak(self) -> int | None:
        """The most bytes that this process held: of the device's memory on a GPU; None where it is not counted."""
        if self.on_cpu:
            return max(self.earlier_peak, peak_memory())
        if self.device.type in ("cuda", "xpu"):
            return torch.accelerator.max_memory_reserved(self.device)
        return None


def memory_plan(accelerator: Accelerator, kind: Kind, layout: BatchLayout, averaged: bool) -> str:
    """What a process of the run will hold at its peak, for a person to compare with what there is.

    Called by all processes.

    Raises:
        UserError: on all processes, if an update does not fit into the memory of one of them.
    """
    size, here = layout.micro_batch_size, processes_here()

    def try_update() -> Trials:
        trials = Trials(accelerator, kind, here, averaged)
        if not all(trials.fits(count) for count in sorted({1, size})):
            raise UserError(
                f"training.micro_batch_size: a trial update with {size} does not fit into the memory of "
                f"{accelerator.device}{trials.shortage(size)}; {less_memory(layout)}"
            )
        return trials

    peak = together(try_update).peak()
    state, image = state_bytes(kind.network, averaged, kind.crop_encoder), activation_bytes(kind)
    total, how = (state + size * image, "by calculation") if peak is None else (peak, "measured in a trial update")
    where = "" if accelerator.device.type == "cpu" else f" of {accelerator.device.type} memory"
    return (
        f"Memory: about {total / 1e6:.0f} MB{where} a process at its peak, {how} with micro-batches of {size}; of it, "
        f"{state / 1e6:.0f} MB are {state_parts(averaged)}, {image / 1e6:.1f} MB an image activations"
    )


def less_memory(layout: BatchLayout) -> str:
    """What to change if a micro-batch does not fit, as part of an error."""
    smaller = layout.smaller()[1:]
    return f"set {smaller[0].overrides}, which keeps the global batch" if smaller else f"use {LESS_PER_IMAGE}"


def largest_layout(accelerator: Accelerator, kind: Kind, layout: BatchLayout, averaged: bool) -> BatchLayout:
    """The layout of the largest micro-batch with which every process can complete a trial update.

    Args:
        kind: on its device, the moving average, if there is one, beside it.
        layout: the largest to be tried.

    Raises:
        UserError: on all processes, if not even single images fit.
    """
    trials, found = Trials(accelerator, kind, processes_here(), averaged), None
    for candidate in reversed(layout.smaller()):
        # All processes must agree: each has its own memory, and measured it at its own moment.
        if not all_agree(trials.fits(candidate.micro_batch_size)):
            break
        found = candidate
    if found is None:
        problem = f"not even single images fit into the memory of {accelerator.device}; use {LESS_PER_IMAGE}"
        raise printed_once(UserError(f"training.micro_batch_size: auto: {problem}"))
    return found


def _within_memory(attempt: Callable[[], T]) -> T | None:
    """Result of `attempt()`, or None if memory ran out."""
    try:
        return attempt()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        clear_device_cache(garbage_collection=True)
