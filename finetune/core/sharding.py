"""What a network holds, spread over the processes by torch's `fully_shard`.

A process keeps 1/P of each weight, cut along its first dimension (a DTensor), and with it 1/P of the weight's gradient,
moments and average. Just before a block computes, its weights are gathered from all processes, to be freed afterwards;
its gradient is averaged over the processes as soon as there is one. So the processes have to go through the network
together: one that has nothing to compute goes through it all the same, or the others would wait for its parts.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.core.distributed import printed_once
from finetune.core.errors import UserError
from finetune.core.kind import Kind

_M_MMAP_THRESHOLD = -3  # of malloc.h


def check_sharding(accelerator: Accelerator, shard: bool) -> None:
    """Raises UserError, on all processes, if the launch asks for something that sharded networks are not trained with.

    fp16 would scale each process's gradients by itself; a compiled network has no blocks to gather weights for.
    """
    precision, backend = accelerator.mixed_precision, accelerator.state.dynamo_plugin.backend
    if not shard or accelerator.num_processes == 1:  # nothing is sharded
        return
    for option, found, expected in (
        ("mixed_precision", precision, ["no", "bf16"]),
        ("dynamo_backend", backend.value.lower(), [DynamoBackend.NO.value.lower()]),
    ):
        if found not in expected:
            asked = f"launch: found --{option} {found} with training.shard and several processes"
            raise printed_once(UserError(f"{asked}; expected {' or '.join(expected)}"))


def place(accelerator: Accelerator, kind: Kind, shard: bool) -> None:
    """Move a kind's network to the device: all of it, or with `shard` this process's part, block by block.

    Called by all processes. One process alone keeps all of it.

    `Accelerator.prepare` would wrap it as DDP, which takes no parts: here it gets the autocast of mixed precision, and
    `prepare` then leaves it as it is.
    """
    network = kind.network
    if not shard or accelerator.num_processes == 1:
        network.to(accelerator.device)
        return
    if accelerator.device.type == "cpu":
        _return_freed_memory()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":  # weights travel as autocast uses them, gradients are summed in float32
        reduced = torch.get_default_dtype()
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=reduced, cast_forward_inputs=False)
    for part in (*kind.blocks(), network):
        # torch would keep the outermost part's weights gathered after a forward pass, where an average that is put in
        # their place would not be seen.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    accelerator.prepare_model(network, evaluation_mode=True)


def _return_freed_memory() -> None:
    """Have the C library return freed memory to the system, in pieces of a megabyte and more, where it can (glibc).

    It would keep what was gathered for a block, in pieces that the next one does not fit into, and a process would hold
    twice what it needs. Costs page faults.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def is_sharded(network: torch.nn.Module) -> bool:
    """Whether this process holds only a part of a network."""
    return isinstance(network, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory, without autograd; an ordinary one is unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    detached: Any = tensor.detach()
    return detached.to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which all processes have to ask for together; an ordinary one is returned unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(full: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds; returned unchanged if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return full
    return local(distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None))


def sharded(local_part: Tensor, like: Tensor) -> Tensor:
    """This process's part as a sharded tensor like `like`; returned unchanged if `like` is not sharded.

    Without shape and stride torch takes all parts to be as large as this one, and they are not where P does not divide.
    """
    if not isinstance(like, DTensor):
        return local_part
    return DTensor.from_local(
        local_part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this process holds of tensors."""
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def gathered_bytes(network: torch.nn.Module) -> int:
    """Bytes that a process holds at most, for a moment, of what is not its own part of a network; 0 if it has all.

    In the backward pass these are the weights of a block; those of the next one, received and laid out; the block's
    gradient; what is summed of it and of the block before, and the sum: about seven times the largest.
    """
    largest, seen = 0, set[Tensor]()
    for module in reversed([*network.modules()]):  # those inside of a block come after it
        if is_sharded(module):
            own = {*module.parameters()} - seen
            largest = max(largest, sum(weight.numel() * weight.element_size() for weight in own))
            seen |= own
    return 7 * largest


@contextmanager
def gathered(kind: Kind, on_this: bool) -> Iterator[None]:
    """For the block, all of a sharded network on the CPU of the processes that ask for it, in place of their parts.

    Gathered one weight at a time, so that a process has one full copy at most. Called by all processes.
    """
    parts = kind.network
    if not is_sharded(parts):
        yield
        return
    copy = kind.without_memory().to_empty(device="cpu").train() if on_this else None
    with torch.no_grad():
        for name, weight in parts.named_parameters():
            full = whole(weight.detach())
            if copy is not None:
                copy.get_parameter(name).copy_(full)
            del full  # before the next one is gathered
        for name, buffer in parts.named_buffers():
            if copy is not None:
                copy.get_buffer(name).copy_(buffer)
    kind.network = parts if copy is None else copy
    try:
        yield
    finally:
        kind.network = parts
