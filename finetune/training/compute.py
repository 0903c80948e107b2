"""What training costs in arithmetic, and how much of it the machine can do at most."""

import time
from collections.abc import Callable, Mapping

import torch
from numpy.polynomial import Polynomial
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finetune.core.kind import Kind, predict
from finetune.core.shapes import Shape

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def flops_per_image(kind: Kind, images: Mapping[Shape, int] | None = None) -> int:
    """Floating-point operations of one image through the network, forward and backward, by torch's counter.

    Where random crops are encoded in the loop, that is counted too. A multiplication and an addition are two. Counted
    on tensors without memory, so that nothing goes through the network itself; what gradient checkpointing computes
    again is not counted.

    A count takes a second or two for Stable Diffusion's UNet, so that of many shapes three are counted: convolutions
    are linear in an image's area, attention is quadratic.

    Args:
        images: how many there are of each shape, for the mean over them; None: one of the first shape.
    """
    return _mean(images or {kind.shapes[0]: 1}, lambda shape: _flops(kind, shape)) + encoding_flops(kind, images)


def encoding_flops(kind: Kind, images: Mapping[Shape, int] | None = None) -> int:
    """Of these, the operations that encode a random crop; 0 where images are encoded before, or not at all."""
    if kind.crop_encoder is None:
        return 0
    return _mean(images or {kind.shapes[0]: 1}, lambda shape: _encoding_flops(kind, shape))


def _mean(counts: Mapping[Shape, int], flops_of: Callable[[Shape], int]) -> int:
    """The mean over so many images of each shape, of which three are asked for."""
    shapes = {shape.area: shape for shape in counts}
    areas = sorted(shapes)
    counted = [*dict.fromkeys((areas[0], areas[len(areas) // 2], areas[-1]))]
    flops = [flops_of(shapes[area]) for area in counted]
    of_area = Polynomial.fit(counted, flops, len(counted) - 1) if len(counted) > 1 else Polynomial(flops)
    return round(sum(count * of_area(shape.area) for shape, count in counts.items()) / sum(counts.values()))


def _flops(kind: Kind, shape: Shape) -> int:
    network = kind.without_memory()
    with torch.device("meta"):
        clean, conditions = kind.inputs(_example(kind, shape))
        with FlopCounterMode(display=False) as counter:
            predict(network, clean, torch.zeros(1, dtype=torch.long), conditions).sum().backward()
    return counter.get_total_flops()


def _encoding_flops(kind: Kind, shape: Shape) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        kind.inputs(_example(kind, shape))
    return counter.get_total_flops()


def _example(kind: Kind, shape: Shape) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in kind.example(1, shape).items()}


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively. A CPU without it emulates bf16 in float32, far slower.

    oneDNN takes AVX-512 of any kind; without the instructions for bfloat16 it is still no faster than float32.
    """
    if device.type != "cpu":
        return True
    emulated = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def peak_rates(device: torch.device, mixed_precision: str) -> dict[str, float]:
    """Peak floating-point operations a second of one process on this machine, measured in a second or two.

    Measured here, since torch.utils.benchmark reports medians, which other load on the machine raises.

    Args:
        mixed_precision: as Accelerate names it; `no` is float32.

    Returns:
        `matmul`, of two square matrices; `convolution`, 3 x 3 over 16 images, the same number of channels in and out.
    """
    dtype, large = _DTYPES[mixed_precision], device.type != "cpu"
    n = 8192 if large else 1024
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    channels, size = (512, 64) if large else (128, 32)
    images = torch.randn(16, channels, size, size, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    return {
        "matmul": _rate(lambda: matrix @ matrix, 2 * n**3, device),
        "convolution": _rate(
            lambda: torch.nn.functional.conv2d(images, kernel, padding=1), 2 * 9 * images.numel() * channels, device
        ),
    }


@torch.no_grad()
def _rate(compute: Callable[[], Tensor], flops: int, device: torch.device) -> float:
    """The fastest of some rounds, to exclude other load."""
    fastest = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        compute()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return flops / fastest


def with_prefix(flops: float) -> str:
    """A number of operations with its prefix: 2.5e9 is `2.5 G`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}"
    return f"{flops / 1e6:.3g} M"
