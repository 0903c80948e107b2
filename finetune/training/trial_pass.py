"""Passes of blank images through the network: to measure what they take, or because other processes make a pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from finetune.core.kind import Arguments, Kind, predict
from finetune.core.sharding import is_sharded, local


def inputs(kind: Kind, count: int) -> tuple[torch.Tensor, Arguments]:
    """What the network is given of `count` blank images, on its device; loads what encodes random crops."""
    device = next(kind.network.parameters()).device
    return kind.inputs({name: tensor.to(device) for name, tensor in kind.example(count).items()})


def forward(kind: Kind, count: int) -> torch.Tensor:
    """The network's output for `count` blank images at timestep 0."""
    clean, conditions = inputs(kind, count)
    timesteps = torch.zeros(count, dtype=torch.long, device=clean.device)
    return predict(kind.network, clean, timesteps, conditions)


def pass_idly(kind: Kind) -> None:
    """Go through the network with nothing to compute: a sharded one needs every process in each forward pass."""
    if is_sharded(kind.network):
        forward(kind, 1)


@contextmanager
def unchanged(kind: Kind) -> Iterator[None]:
    """Restore gradients, buffers and generators (dropout draws) after the block, in which there are no gradients."""
    parameters, buffers = list(kind.network.parameters()), list(kind.network.buffers())
    gradients, values = [parameter.grad for parameter in parameters], [buffer.clone() for buffer in buffers]
    device = parameters[0].device
    on_device = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**on_device or {"devices": []}):
            kind.network.zero_grad(set_to_none=True)
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def activation_bytes(kind: Kind) -> int:
    """Bytes that autograd keeps of one image between forward and backward, measured by a forward pass of one image.

    Under mixed precision about half of it; with gradient checkpointing only what is kept between the blocks.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        unchanged(kind),
        _addresses(kind.network) as weights,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        forward(kind, 1).sum()
    return sum(kept.values())


@contextmanager
def _addresses(network: torch.nn.Module) -> Iterator[set[int]]:
    """Where the weights are in memory; of a sharded network also those of the blocks that are gathered at the time."""
    addresses, gathered, hooks = {local(weight).data_ptr() for weight in network.parameters()}, {}, []

    def arrived(module: torch.nn.Module, *_: object) -> None:
        gathered[module] = {weight.data_ptr() for weight in map(local, module.parameters())} - addresses
        addresses.update(gathered[module])

    def left(module: torch.nn.Module, *_: object) -> None:
        addresses.difference_update(gathered.pop(module))

    for module in network.modules():
        if is_sharded(module):
            hooks += [module.register_forward_pre_hook(arrived), module.register_forward_hook(left)]
    try:
        yield addresses
    finally:
        for hook in hooks:
            hook.remove()
