"""Validation and samples of many shapes."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from finetune.config.outputs import SamplesConfig
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.data.pixels import SHAPED_FEATURES, Images, Original, shaped_row
from finetune.evaluation.pictures import beside, grid
from finetune.evaluation.rounds import rounds
from finetune.evaluation.sampling import ImageSampler, sampled_shapes
from finetune.evaluation.validation import Validation
from finetune.models.unconditional import Unconditional
from finetune.training.compute import flops_per_image
from harness.batches import batches
from harness.configs import UNET
from harness.processes import forget_processes


@pytest.fixture
def accelerator():
    forget_processes()
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def kind():
    torch.manual_seed(0)
    return Unconditional(UNet2DModel(**UNET), DDPMScheduler())


def test_a_chunk_has_one_shape(accelerator):
    shapes = "abababababababababab"  # ten each, in chunks of at most eight
    found = list(rounds(20, accelerator, shapes))
    assert [len(chunk) for chunk in found] == [8, 2, 8, 2]
    assert all(len({shapes[index] for index in chunk}) == 1 for chunk in found)
    assert sorted(index for chunk in found for index in chunk) == list(range(20))


def test_a_draw_of_many_shapes_has_the_loss_that_it_has_alone(accelerator, kind):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*sides, 1), dtype=np.uint8) for sides in ((8, 8), (4, 16), (8, 8), (12, 6))]
    rows = [shaped_row(image, Original(*image.shape[1::-1], colour=False), Shape(*image.shape[:2])) for image in images]
    table = datasets.Dataset.from_list(rows, features=SHAPED_FEATURES)
    together = Validation(batches(Images(table, np.arange(4), 1, 8)), 4, 3, kind, None)
    losses = together.losses(accelerator, lambda: None)
    for index, image in enumerate(images):
        made = together._predict(torch.device("cpu"), [index], [index], together.timesteps[[index]])
        assert made.clean.shape == (1, 1, *image.shape[:2])
        # an image's loss is the mean over its own pixels
        assert losses[index] == pytest.approx((made.output - made.noise).square().mean().item(), rel=1e-5)


def test_samples_have_the_shape_that_is_asked_for(accelerator, kind):
    images = {Shape(4, 16): 5, Shape(8, 8): 2}
    assert sampled_shapes(SamplesConfig(), images) == [Shape(4, 16)]  # the most frequent
    assert sampled_shapes(SamplesConfig(shapes=[[8, 8], [16, 4]]), images) == [Shape(8, 8), Shape(4, 16)]
    with pytest.raises(UserError, match=r"samples\.shapes: found 4 x 16; expected shapes of the images"):
        sampled_shapes(SamplesConfig(shapes=[[4, 16]]), images)
    sampler = ImageSampler(kind, accelerator, lambda: None, 0, 2)
    drawn = np.stack(sampler.sample([None] * 3, [Shape(4, 16)] * 3))
    assert drawn.shape == (3, 4, 16, 1)
    wide, tall = grid(drawn), grid(drawn.swapaxes(1, 2))
    both = beside([wide, tall])
    assert both.size == (wide.width + 8 + tall.width, max(wide.height, tall.height))


def test_each_image_is_drawn_in_its_own_shape(accelerator, kind):
    """And as among images of that shape alone: the starting noise is that of its place."""
    wide, square = Shape(4, 16), Shape(8, 8)
    sampler = ImageSampler(kind, accelerator, lambda: None, 0, 2)
    drawn = sampler.sample([None] * 3, [wide, square, wide])
    for shape in (wide, square):
        alone = sampler.sample([None] * 3, [shape] * 3)
        for index in range(3):
            if drawn[index].shape == (*shape, 1):
                assert abs(drawn[index].astype(int) - alone[index]).max() <= 1
    assert [image.shape for image in drawn] == [(4, 16, 1), (8, 8, 1), (4, 16, 1)]


def test_compute_is_the_mean_over_the_images_and_the_largest_area_is_tried_for_memory(kind):
    small, large = Shape(4, 8), Shape(8, 16)
    one, other = (flops_per_image(kind, {shape: 1}) for shape in (small, large))
    assert flops_per_image(kind, {small: 3, large: 1}) == round((3 * one + other) / 4)
    shaped = Unconditional(kind.network, kind.noise_scheduler)
    shaped.train_shapes([small, large, Shape(8, 8)])
    assert shaped.example(2)["images"].shape == (2, 1, 8, 16)
    assert shaped.example(2, small)["images"].shape == (2, 1, 4, 8)
