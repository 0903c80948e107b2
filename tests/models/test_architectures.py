"""Every time embedding, block and attention of UNet2DModel: it is trained, or refused when the model is loaded."""

import copy
import inspect
import itertools
import re

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.unets import unet_2d_blocks

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.models.load import load_kind
from finetune.models.unet import narrowest
from finetune.training.compute import flops_per_image
from harness.compare import unequal
from harness.configs import UNET

TIMESTEPS = 50
# Colours, and channels in the groups of 32 that some blocks insist on.
WIDE = {**UNET, "in_channels": 3, "out_channels": 3, "block_out_channels": [32, 32], "norm_num_groups": 8}

TRAINED = {
    "positional": {"time_embedding_type": "positional"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": TIMESTEPS},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "down by a resnet": {"downsample_type": "resnet"},
    "up by a resnet": {"upsample_type": "resnet"},
    "no middle": {"mid_block_type": None},
    "no attention": {"add_attention": False},
    "one head": {"attention_head_dim": None},
    "groups in attention": {"attn_norm_num_groups": 4},
    "padding 0": {"downsample_padding": 0},
    "centred": {"center_input_sample": True},
    "down and up by K blocks": {"down_block_types": ["KDownBlock2D"] * 2, "up_block_types": ["KUpBlock2D"] * 2},
} | {
    f"{way} by {block}": {f"{way}_block_types": [block, block]}
    for way, blocks in {
        "down": [
            "DownBlock2D",
            "ResnetDownsampleBlock2D",
            "AttnDownBlock2D",
            "SkipDownBlock2D",
            "AttnSkipDownBlock2D",
        ],
        "up": ["UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D"],
    }.items()
    for block in blocks
}

NOT_BUILT = "model.unet: UNet2DModel cannot be built from it: "
NOT_RUN = "model: a UNet2DModel of this config cannot denoise images of 8 x 8 pixels: "
NOT_FINITE = f"model: the network's prediction is not finite at timestep 0 or {TIMESTEPS - 1}, before any training"
REFUSED = {
    "fourier": ({"time_embedding_type": "fourier"}, "model.unet.time_embedding_type: found fourier"),
    "learned, of no number": ({"time_embedding_type": "learned"}, NOT_BUILT),
    "learned, too few": (
        {"time_embedding_type": "learned", "num_train_timesteps": TIMESTEPS - 1},
        "model.unet.num_train_timesteps: found 49 learned embeddings; expected at least 50",
    ),
    # half of the first 32 channels is 16: the frequencies' exponents are divided by 16 - freq_shift
    "frequencies divided by zero": ({"freq_shift": 16}, NOT_FINITE),
    "a middle divided by zero": ({"mid_block_scale_factor": 0}, NOT_FINITE),
    "a root of a negative variance": ({"norm_eps": -1.0}, NOT_FINITE),
    "embedding unknown": ({"time_embedding_type": "nonsense"}, NOT_BUILT),
    "ada_group": ({"resnet_time_scale_shift": "ada_group"}, NOT_BUILT),
    "spatial": ({"resnet_time_scale_shift": "spatial"}, NOT_BUILT),
    "more dimensions in a head than channels": ({"attention_head_dim": 64}, NOT_RUN),
} | {
    block: ({f"{way}_block_types": [block, block]}, line)
    for way, blocks in {
        "down": {
            "CrossAttnDownBlock2D": NOT_BUILT,
            "SimpleCrossAttnDownBlock2D": NOT_BUILT,
            "DownEncoderBlock2D": NOT_RUN,
            "AttnDownEncoderBlock2D": NOT_RUN,
            "KDownBlock2D": NOT_RUN,  # without KUpBlock2D
            "KCrossAttnDownBlock2D": NOT_RUN,
        },
        "up": {
            "CrossAttnUpBlock2D": NOT_BUILT,
            "SimpleCrossAttnUpBlock2D": NOT_BUILT,
            "UpDecoderBlock2D": NOT_RUN,
            "AttnUpDecoderBlock2D": NOT_RUN,
            "KUpBlock2D": NOT_RUN,  # without KDownBlock2D
            "KCrossAttnUpBlock2D": NOT_RUN,
        },
    }.items()
    for block, line in blocks.items()
}


def load(changes):
    options = {"num_train_timesteps": TIMESTEPS}
    return load_kind(ModelConfig(unet=WIDE | changes, noise_scheduler=options), None, 0)


def operations(network):
    """Of an image of 8 x 8, by the sizes of its layers.

    A layer multiplies and adds each weight once for each place of its output; again for the weight's gradient, and a
    third time for the input's, if something before it is trained. Attention of n tokens with c channels takes two
    products of n x n x c forward, queries by keys and those by values, and four backward.
    """
    found = []

    def of_layer(layer, inputs, output):
        places = output.numel() // len(layer.weight)
        found.append((2 + inputs[0].requires_grad) * 2 * places * layer.weight.numel())

    def of_attention(layer, inputs, output):
        _, channels, height, width = inputs[0].shape
        found.append((2 + 4) * 2 * (height * width) ** 2 * channels)

    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(of_layer)
        elif isinstance(layer, Attention):
            layer.register_forward_hook(of_attention)
    network(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    return sum(found)


@pytest.mark.parametrize("name", TRAINED)
def test_its_operations_are_those_of_its_layers(name):
    counted, expected = flops_per_image(load(TRAINED[name])), operations(load(TRAINED[name]).network)
    if "Skip" in name or "K blocks" in name:  # which resize by convolutions with constants: layers without weights
        assert expected < counted < 1.2 * expected
    else:
        assert counted == expected


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINED)
def test_a_network_that_takes_the_narrowest_shape_takes_all(name):
    network = UNet2DModel(**WIDE | TRAINED[name])
    shapes = [Shape(2 * height, 2 * width) for height, width in itertools.product(range(1, 5), repeat=2)]

    def is_taken(shape):
        sample = torch.zeros(1, 3, *shape)
        try:
            return network(sample, torch.tensor([0])).sample.shape == sample.shape
        except (RuntimeError, ValueError):
            return False

    refused = [shape for shape in shapes if not is_taken(shape)]
    if "K blocks" in name:  # reflect a row and a column, and need two of each where pixels are fewest
        assert refused == [shape for shape in shapes if 2 in shape]
    elif "AttnSkip" in name:  # normalise each channel, which takes more than one pixel
        assert refused == [Shape(2, 2)]
    else:
        assert refused == []
    for some in itertools.combinations(shapes, 2):
        assert (narrowest(some) in refused) == any(shape in refused for shape in some)


def test_every_block_of_diffusers_is_here():
    for way in ("down", "up"):
        source = inspect.getsource(getattr(unet_2d_blocks, f"get_{way}_block"))
        known = re.findall(rf'{way}_block_type == "(\w+)"', source)
        tested = [changes.get(f"{way}_block_types") for changes in TRAINED.values()]
        tested += [changes.get(f"{way}_block_types") for changes, _ in REFUSED.values()]
        assert {blocks[0] for blocks in tested if blocks} == set(known)


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_trained_at_the_first_and_the_last_timestep_and_exported(tmp_path, name):
    kind = load(TRAINED[name])
    optimizer = torch.optim.AdamW(kind.network.parameters(), lr=1e-4)
    before = copy.deepcopy(kind.trainable())
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, TIMESTEPS - 1])
    noisy = kind.noise_scheduler.add_noise(images, noise, timesteps)
    (kind.network(noisy, timesteps).sample - noise).square().mean().backward()
    for weight in kind.trainable().values():
        assert weight.grad.isfinite().all()
    optimizer.step()
    assert unequal(before, kind.trainable()) == sorted(before)  # no block has a layer that it does not use
    kind.pipeline().save_pretrained(tmp_path)
    exported = DDPMPipeline.from_pretrained(tmp_path).unet.eval()
    with torch.no_grad():
        assert torch.equal(exported(noisy, timesteps).sample, kind.network.eval()(noisy, timesteps).sample)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_when_it_is_loaded(name):
    changes, line = REFUSED[name]
    with pytest.raises(UserError) as failure:
        load(changes)
    (problem,) = failure.value.problems
    assert problem.startswith(line)
    assert "\n" not in problem
