"""Each fast way to compute what training computes, against the plain one: gradients and updates within rounding.

How much faster each is stands in the tables of tests/benchmarks/speed.py; what inductor compiles is compared at the
start of a run (see test_soundness.py).
"""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune.config.updates import EMAConfig, OptimizerConfig
from finetune.models.ema import make_ema
from finetune.training.optim import make_optimizer
from harness.configs import UNET

FLOAT32, BF16 = 2**-24, 2**-8  # unit roundoffs

# Rounding in a network: each layer rounds what it hands on, by up to u of itself, and the errors of d layers in a row
# add up like independent ones to about sqrt(d) u, forward and backward. UNET has eight residual blocks of two times
# normalisation, activation and convolution, and so d = 50: sqrt(2 x 50) u = 10 u. A layer's own sums of n terms add
# about sqrt(log2 n) u, at most 3.5 u for the 8 x 9 x 64 = 4,608 terms of the largest.
ROUNDINGS = 10 * 3.5


def gradients(
    unet: UNet2DModel, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """Of the mean squared error of four images, as one vector."""
    unet = copy.deepcopy(unet)
    torch.nn.Module.to(unet, dtype=dtype, memory_format=memory_format)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(4, 1, 8, 8, generator=generator).to(dtype) for _ in range(2))
    images = images.contiguous(memory_format=memory_format)
    prediction = unet(images, torch.tensor([0, 300, 600, 999])).sample
    (prediction.to(dtype) - noise).square().mean().backward()
    return torch.cat([weight.grad.contiguous().double().flatten() for weight in unet.parameters()])


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(**UNET | {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}).train()


@pytest.fixture(scope="module")
def exact(unet):
    return gradients(unet, torch.float64)


def checkpointed(unet):
    unet = copy.deepcopy(unet)
    unet.enable_gradient_checkpointing()
    return gradients(unet)


def without_onednn(unet):
    with torch.backends.mkldnn.flags(enabled=False):
        return gradients(unet)


def in_bf16(unet):
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(unet)


def with_attention(backend) -> Callable:
    def attend(unet):
        with sdpa_kernel(backend):
            return gradients(unet)

    return attend


PATHS = {
    "plain": (gradients, FLOAT32),
    "channels last": (lambda unet: gradients(unet, memory_format=torch.channels_last), FLOAT32),
    "gradient checkpointing": (checkpointed, FLOAT32),
    "without oneDNN": (without_onednn, FLOAT32),
    "flash attention": (with_attention(SDPBackend.FLASH_ATTENTION), FLOAT32),
    "attention by definition": (with_attention(SDPBackend.MATH), FLOAT32),
    "bfloat16": (in_bf16, BF16),
}


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_exact_up_to_rounding(unet, exact, path):
    compute, roundoff = PATHS[path]
    difference = float((compute(unet) - exact).norm() / exact.norm())
    assert difference < ROUNDINGS * roundoff
    assert difference > roundoff / 100  # and it was this precision


def test_gradient_checkpointing_computes_the_same_to_the_bit(unet):
    assert torch.equal(checkpointed(unet), gradients(unet))


def test_fused_adamw_makes_the_updates_of_the_definition():
    """Loshchilov & Hutter 2019, algorithm 2, in float64, over updates whose gradients are of very different sizes."""
    config = OptimizerConfig(learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000, generator=generator))
    optimizer = make_optimizer([weight], config)
    assert optimizer.param_groups[0]["fused"]
    exact, first, second = weight.detach().double(), torch.zeros(1000).double(), torch.zeros(1000).double()
    for update in range(1, 11):
        weight.grad = torch.randn(1000, generator=generator) * 10.0 ** (update % 4 - 2)
        optimizer.step()
        gradient = weight.grad.double()
        exact = exact * (1 - 1e-2 * 0.1)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        exact = exact - 1e-2 * (first / (1 - 0.9**update)) / ((second / (1 - 0.99**update)).sqrt() + 1e-8)
    # Each update rounds a weight below 4 twice, by 4 u, and moves it by at most 0.1 with an error of some ten u.
    torch.testing.assert_close(weight.detach().double(), exact, rtol=0, atol=10 * (2 * 4 + 1) * FLOAT32)


def test_the_average_in_one_pass_is_the_plain_one():
    """EMAModel, tensor by tensor, and ours, of all of them at once."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (1, 30, 1000)]
    fast = make_ema(weights, EMAConfig(decay=0.99, power=0.75))
    plain = EMAModel(weights, decay=0.99, use_ema_warmup=True, power=0.75, foreach=False)
    for _ in range(10):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn(weight.shape, generator=generator))
        fast.step(weights)
        plain.step(weights)
    for one, other in zip(fast.shadow_params, plain.shadow_params, strict=True):
        # three roundings an update of numbers below 16
        torch.testing.assert_close(one, other, rtol=0, atol=10 * 3 * 16 * FLOAT32)
    assert not torch.equal(fast.shadow_params[2], weights[2])
