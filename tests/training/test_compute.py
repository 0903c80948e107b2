"""The arithmetic of training, counted, and the machine's peak rates, measured."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.config.inputs import ModelConfig
from finetune.core.shapes import Shape
from finetune.models.load import load_kind
from finetune.models.unconditional import Unconditional
from finetune.training import compute
from finetune.training.compute import encoding_flops, flops_per_image, has_bf16, peak_rates, with_prefix
from harness.compare import unequal
from harness.configs import UNET, of_kind
from harness.pipelines import save_pipeline, vae

CONVOLUTIONS = UNET | {"add_attention": False}  # whose kernels differ in what they compute again for the gradient
ATTENTION = UNET | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}


def kind(resolution: int = 8, **options) -> Unconditional:
    return load_kind(ModelConfig(unet=CONVOLUTIONS, **options), resolution, 0)


def test_operations_an_image_are_those_of_the_network_itself():
    counted, unet = flops_per_image(kind()), kind().network
    with FlopCounterMode(display=False) as counter:
        unet(torch.zeros(3, 1, 8, 8), torch.zeros(3)).sample.sum().backward()
    assert counter.get_total_flops() == 3 * counted
    # Its first convolution alone: 64 places x 8 channels x 9 weights, twice, forward and for the weights' gradient.
    first = counter.get_flop_counts()["UNet2DModel.conv_in"]
    assert first[torch.ops.aten.convolution] == first[torch.ops.aten.convolution_backward] == 3 * 2 * 64 * 8 * 9


def test_counting_leaves_the_network_as_it_was():
    counted = kind()
    before = copy.deepcopy(counted.network.state_dict())
    flops_per_image(counted)
    assert all(parameter.grad is None for parameter in counted.network.parameters())
    assert unequal(counted.network.state_dict(), before) == []


def test_what_gradient_checkpointing_computes_again_is_not_counted():
    assert flops_per_image(kind(gradient_checkpointing=True)) == flops_per_image(kind())


def test_twice_the_pixels_is_four_times_the_convolutions():
    """The timestep's embedding does not grow."""
    small, middle, large = (flops_per_image(kind(size)) for size in (8, 16, 32))
    assert large - middle == 4 * (middle - small)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unconditional", "sdxl", "lora"])
def test_of_many_shapes_three_are_counted(tmp_path, monkeypatch, name):
    """The mean is as exact as if all of them were: convolutions and attention give a polynomial of the area."""
    options = of_kind(name, tmp_path / "pictures", whole=True).get("model", {"unet": ATTENTION})
    trained = load_kind(ModelConfig(**options), 8, 0)
    images = {Shape(8, 8): 5, Shape(8, 16): 1, Shape(16, 8): 2, Shape(8, 24): 3, Shape(32, 32): 7}
    exact, counted = {shape: compute._flops(trained, shape) for shape in images}, []
    monkeypatch.setattr(compute, "_flops", lambda kind, shape: counted.append(shape) or exact[shape])
    assert flops_per_image(trained, images) == round(sum(images[shape] * exact[shape] for shape in images) / 18)
    assert [shape.area for shape in counted] == [64, 192, 1024]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_encoding_in_the_loop_is_counted_with_the_update(tmp_path, lora):
    """As much as torch counts of the VAE's own encoder, and for twice the pixels more.

    Attention's kernel of a CPU it does not count: 16 latent pixels by 16, of 8 channels, two products of matrices.
    """
    config = ModelConfig(pretrained=save_pipeline(tmp_path / "sd"), lora=lora)
    encoded, cropping = (load_kind(config, None, 0, crops=crops) for crops in (False, True))
    with FlopCounterMode(display=False) as counter:
        vae().encode(torch.zeros(1, 1, 8, 8))
    assert encoding_flops(encoded) == 0
    assert encoding_flops(cropping) == counter.get_total_flops() + 2 * (2 * 16 * 16 * 8) > 10**5
    assert flops_per_image(cropping) == flops_per_image(encoded) + encoding_flops(cropping)
    alone, mixed = Shape(8, 16), {Shape(8, 8): 1, Shape(8, 16): 3}
    expected = (encoding_flops(cropping) + 3 * encoding_flops(cropping, {alone: 1})) / 4
    assert encoding_flops(cropping, mixed) == round(expected) > encoding_flops(cropping)


def test_a_rate_is_the_work_of_the_fastest_round(monkeypatch):
    clock = iter([0, 4, 4, 6, *range(10, 500, 5)])
    monkeypatch.setattr(compute.time, "perf_counter", lambda: next(clock))
    rates = peak_rates(torch.device("cpu"), "no")
    assert rates["matmul"] == 2 * 1024**3 / 2  # rounds of 4 s, 2 s, then 5 s each
    assert rates["convolution"] == pytest.approx(2 * 9 * 16 * 128 * 128 * 32 * 32 / 5)


@pytest.mark.parametrize(
    ("onednn", "avx512", "avx512_bf16", "has"),
    [
        (False, False, False, False),  # AVX2
        (True, True, False, False),  # AVX-512 of the first generations
        (True, True, True, True),
        (True, False, False, True),  # no x86, or AVX2 with conversions
    ],
)
def test_native_bfloat16_of_a_cpu(monkeypatch, onednn, avx512, avx512_bf16, has):
    monkeypatch.setattr(compute.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(compute.torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(compute.torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert has_bf16(torch.device("cpu")) == has
    assert has_bf16(torch.device("cuda"))
    monkeypatch.setattr(compute.torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bf16(torch.device("cpu"))


def test_operations_are_printed_with_their_prefix():
    assert [with_prefix(number) for number in (2.5e6, 1e9, 1.49e12, 3e15)] == ["2.5 M", "1 G", "1.49 T", "3 P"]
