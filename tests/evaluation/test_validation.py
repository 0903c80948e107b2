"""Validation without sampling noise: its draws are fixed, and its losses are the network's alone."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.config.inputs import ModelConfig
from finetune.core.randomness import noise
from finetune.core.stopping import Interrupted, StopCheck
from finetune.evaluation.rounds import CHUNK
from finetune.evaluation.validation import Validation
from finetune.models.load import load_kind
from harness.batches import as_images, batches
from harness.configs import UNET
from harness.faults import RequestedAt

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
DRAWS = 20


def never() -> None: ...


@pytest.fixture
def validation():
    options = {"num_train_timesteps": 100}
    kind = load_kind(ModelConfig(unet=UNET, noise_scheduler=options), None, 0)
    return Validation(batches(as_images(IMAGES)), DRAWS, 3, kind, None)


def predict_nothing(kind):
    """Have the network answer 0 whatever it sees, so that its loss is the mean square of the target."""
    with torch.no_grad():
        kind.network.conv_out.weight.zero_()
        kind.network.conv_out.bias.zero_()


def test_timesteps_are_spread_evenly(validation):
    # 20 draws over 100: the middle of each twentieth
    assert validation.timesteps.tolist() == list(range(2, 100, 5))


def test_two_evaluations_of_the_same_weights_are_identical(validation):
    accelerator, network = Accelerator(cpu=True), validation.kind.network
    torch.manual_seed(1)
    first = validation.losses(accelerator, never)
    torch.manual_seed(2)
    second = validation.losses(accelerator, never)
    assert first.dtype == np.float64
    assert len(first) == DRAWS
    assert (first == second).all()
    assert network.training
    with torch.no_grad():
        network.conv_out.bias.add_(0.1)
    assert not (first == validation.losses(accelerator, never)).any()


def test_the_loss_of_each_draw_is_that_of_its_own_noise(validation):
    """A network that predicts 0 loses the mean square of the noise, which is a function of (seed, draw)."""
    predict_nothing(validation.kind)
    losses = validation.losses(Accelerator(cpu=True), never)
    expected = [noise(3, 0, draw, (1, 8, 8), "validation").double().square().mean().item() for draw in range(DRAWS)]
    # float32 in whatever order its 64 squares are added up
    assert losses == pytest.approx(expected, rel=64 * 2**-24)


def test_images_take_turns_over_the_draws(validation):
    """Draw i shows image i mod 5: a network that predicts 0 where the target is the image loses its mean square."""
    validation.kind.noise_scheduler.register_to_config(prediction_type="sample")
    predict_nothing(validation.kind)
    losses = validation.losses(Accelerator(cpu=True), never)
    squares = ((IMAGES / 127.5 - 1.0) ** 2).mean((1, 2, 3))
    assert losses == pytest.approx(np.tile(squares, DRAWS // 5), rel=64 * 2**-24)


def test_an_evaluation_ends_at_the_next_chunk_after_a_stop(validation):
    accelerator, requested = Accelerator(cpu=True), RequestedAt(3)
    with pytest.raises(Interrupted):
        validation.losses(accelerator, StopCheck(requested))
    assert requested.asked == 3
    assert validation.kind.network.training


def test_a_denoising_strip_has_the_noisy_images_first_then_the_predictions(validation):
    """A network that predicts no noise gives back x_t / sqrt(alpha_bar), a brighter copy of the noisy image."""
    predict_nothing(validation.kind)
    strip = validation.denoise(torch.device("cpu"))
    assert strip.shape == (2 * CHUNK, 8, 8, 1)
    timesteps = [6, 18, 31, 43, 56, 68, 81, 93]  # 100 (i + 1/2) / 8
    alphas = validation.kind.noise_scheduler.alphas_cumprod[timesteps].double().numpy()
    image = (IMAGES[0] / 127.5 - 1.0).squeeze(-1)
    for place, alpha in enumerate(alphas):
        drawn = noise(3, 0, place, (1, 8, 8), "validation")[0].double().numpy()
        noisy = alpha**0.5 * image + (1 - alpha) ** 0.5 * drawn
        for found, expected in ((strip[place], noisy), (strip[CHUNK + place], noisy / alpha**0.5)):
            pixels = (expected / 2 + 0.5).clip(0, 1) * 255
            # rounded to whole pixels, and by what float32 makes of a number just beside a half
            assert np.abs(found.squeeze(-1) - pixels).max() <= 0.5 + 1e-3
