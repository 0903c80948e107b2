"""Whether a network keeps the promises of the run before it is trained: its batch layout, its compiled gradients."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from accelerate.utils.operations import recursively_apply
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from finetune.core.distributed import all_agree, printed_once, say
from finetune.core.errors import UserError, first_line
from finetune.core.kind import Kind, predict
from finetune.core.randomness import noise
from finetune.core.shapes import Shape

# Compiled kernels round at other places and add up in other orders, so their error is another draw of the same size;
# ten times as much covers sums that are added up one by one where the uncompiled kernels do it in a tree.
_TOLERATED = 10


def layout_dependent_layers(network: torch.nn.Module) -> list[str]:
    """Layers whose result depends on the batch layout: dropout (a global generator) and batch statistics."""
    found = []
    for name, module in network.named_modules():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        if drops or isinstance(module, _BatchNorm):
            found.append(f"{name} ({type(module).__name__})")
    return found


def check_compiled(accelerator: Accelerator, network: torch.nn.Module, kind: Kind, micro_batch_size: int) -> None:
    """Compare the gradients of a compiled network with the uncompiled one's, on a micro-batch, before it is trained.

    Where pictures have several shapes, also on a shorter one of another shape: each gets a graph, for any length.

    Both are compared with float64. Where inductor's are wrong, its layout optimisation is turned off, and they are
    compared again. With it, torch 2.13.0 on a CPU copies the zeros of an upsampling's gradient before the gradient is
    added to them: the layers below get zeros, while the loss is right. (pytorch/pytorch#185509 has the same symptom.)

    Args:
        network: prepared by the Accelerator, which compiles it if the launch says so. Called by all processes.
        kind: holds the bare network.

    Raises:
        UserError: if the network cannot be compiled, or its gradients are wrong.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend == DynamoBackend.NO:
        return
    if len(kind.shapes) > 1:
        _compile_shapes(network, len(kind.shapes), micro_batch_size)
    tried = _micro_batches(kind.shapes, micro_batch_size)
    option = f"launch: --dynamo_backend {backend.value.lower()}"
    exact = _exact_gradients(kind, tried, accelerator.device)
    plain = _distance(_gradients(kind.network, kind, tried, accelerator.device), exact)
    compiled = _compiled_distance(option, network, kind, tried, accelerator.device, exact)
    if not _acceptable(compiled, plain) and backend == DynamoBackend.INDUCTOR:
        say(
            f"Note: relative error of the gradients against float64: {compiled:.1e} compiled, {plain:.1e} uncompiled; "
            "torch._inductor.config.layout_optimization is turned off"
        )
        torch._inductor.config.layout_optimization = False
        torch._dynamo.reset()
        compiled = _compiled_distance(option, network, kind, tried, accelerator.device, exact)
    if not _acceptable(compiled, plain):
        found = f"found a relative error of the gradients against float64 of {compiled:.1e}, uncompiled {plain:.1e}"
        raise printed_once(UserError(f"{option}: {found} (micro-batch of {micro_batch_size}); set --dynamo_backend no"))
    say(f"Relative error of the gradients against float64: {compiled:.1e} compiled, {plain:.1e} uncompiled")


def _compile_shapes(network: torch.nn.Module, shapes: int, micro_batch_size: int) -> None:
    """Have a graph made for each shape, whose micro-batches may have any length; single images get one of their own.

    By itself dynamo would make one graph for any height and width, which inductor of torch 2.13.0 fails to compile. At
    its limit, which here allows for a graph for each length too, it stops compiling without a word.
    """
    config = torch._dynamo.config
    config.automatic_dynamic_shapes = False
    config.recompile_limit = max(config.recompile_limit, 2 * shapes * micro_batch_size)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)

    def mark(tensor: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return tensor

    def mark_lengths(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        recursively_apply(mark, (given, named))

    network.register_forward_pre_hook(mark_lengths, with_kwargs=True)


def compiler_problem(error: TorchDynamoException, option: str = "launch: --dynamo_backend") -> UserError:
    """The error for the user if a network cannot be compiled."""
    return UserError(f"{option}: the network cannot be compiled ({first_line(error)}); set --dynamo_backend no")


def _micro_batches(shapes: Sequence[Shape], micro_batch_size: int) -> list[tuple[Shape, int]]:
    """What is tried: a full micro-batch of the largest area, and a shorter one whose sides are others."""
    largest = max(shapes, key=lambda shape: shape.area)
    other = max(shapes, key=lambda shape: min(abs(shape.height - largest.height), abs(shape.width - largest.width)))
    full = [(largest, micro_batch_size)]
    return full if len(shapes) == 1 else [*full, (other, max(micro_batch_size - 1, 1))]


def _acceptable(compiled: float, plain: float) -> bool:
    """Whether no process finds the compiled gradients farther off than rounding explains.

    Where the uncompiled gradients are not finite either, nothing can be told, and the first update is
    refused with a message of its own.
    """
    rounding = torch.finfo(torch.float32).eps
    return all_agree(not math.isfinite(plain) or compiled <= _TOLERATED * plain + rounding)


def _compiled_distance(
    option: str,
    network: torch.nn.Module,
    kind: Kind,
    tried: Sequence[tuple[Shape, int]],
    device: torch.device,
    exact: list[Tensor],
) -> float:
    try:
        return _distance(_gradients(network, kind, tried, device), exact)
    except TorchDynamoException as error:
        raise printed_once(compiler_problem(error, option)) from error


def _gradients(
    network: torch.nn.Module, kind: Kind, tried: Sequence[tuple[Shape, int]], device: torch.device
) -> list[Tensor]:
    """Gradients of the mean squared error for all trainable parameters, micro-batch by micro-batch."""
    gradients = []
    # Dropout draws, and the compiled network draws other numbers.
    network.train(not layout_dependent_layers(kind.network))
    for shape, count in tried:
        _loss(network, kind, shape, range(count), count, device, torch.get_default_dtype()).backward()
        gradients += _taken(kind.trainable().values())
    network.train()
    return gradients


def _taken(weights: Iterable[Tensor]) -> list[Tensor]:
    """Clone the gradients of weights, and clear them."""
    taken = []
    for weight in weights:
        # Cloned, since DDP's gradients lie in the buckets that it reduces, and the next ones overwrite them.
        taken.append(torch.zeros_like(weight) if weight.grad is None else weight.grad.clone())
        weight.grad = None
    return taken


def _exact_gradients(kind: Kind, tried: Sequence[tuple[Shape, int]], device: torch.device) -> list[Tensor]:
    """The same in float64, an image at a time so that no more memory is needed than for four copies of the weights."""
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    exact = copy.deepcopy(kind.network)
    exact.__dict__.pop("forward", None)  # Accelerate's autocast, which calls the original
    torch.nn.Module.to(exact, device, torch.float64)  # diffusers' own `to` warns
    exact.train(not layout_dependent_layers(exact))
    named, gradients = dict(exact.named_parameters()), []
    for shape, count in tried:
        for index in range(count):
            _loss(exact, kind, shape, range(index, index + 1), count, device, torch.float64).backward()
        gradients += _taken([named[name] for name in kind.trainable()])
    return gradients


def _loss(
    network: torch.nn.Module,
    kind: Kind,
    shape: Shape,
    images: range,
    count: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Squared error of these images' predictions, as their share of the mean over `count` images.

    Blank images under noise, at timesteps over the whole range; every image's are its own.
    """
    batch = {name: tensor.to(device) for name, tensor in kind.example(len(images), shape).items()}
    clean, conditions = kind.inputs(batch)
    drawn = torch.stack([noise(0, 0, index, tuple(clean.shape[1:]), "compile") for index in images]).to(device)
    steps = kind.noise_scheduler.config.num_train_timesteps
    timesteps = torch.tensor([(2 * index + 1) * steps // (2 * count) for index in images], device=device)
    noisy = kind.noise_scheduler.add_noise(clean, drawn, timesteps).to(dtype)
    conditions = recursively_apply(lambda value: value.to(dtype) if value.is_floating_point() else value, conditions)
    prediction = predict(network, noisy, timesteps, conditions)
    return (prediction - drawn.to(dtype)).square().mean() * (len(images) / count)


def _distance(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the exact ones, all of them as one vector."""
    pairs = [(one.to(other.device, torch.float64), other) for one, other in zip(found, exact, strict=True)]
    apart = math.sqrt(sum(float((one - other).square().sum()) for one, other in pairs))
    return apart / max(math.sqrt(sum(float(other.square().sum()) for _, other in pairs)), 1e-300)
