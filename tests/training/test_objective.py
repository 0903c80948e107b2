"""Targets, the images they imply, min-SNR weights and per-image losses, against numbers worked out by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from finetune.training.objective import loss_per_image, min_snr_weights, predicted_images, target


def scheduler(prediction_type, **options):
    # one step of noise each: alphas_cumprod = 0.8, 0.8 x 0.25 = 0.2, so SNR = 0.8 / 0.2 = 4 and 0.2 / 0.8 = 0.25
    return DDPMScheduler(num_train_timesteps=2, trained_betas=[0.2, 0.75], prediction_type=prediction_type, **options)


IMAGES, NOISE, TIMESTEPS = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), 5.0), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [5.0, 5.0]),
        ("sample", [3.0, 3.0]),
        # v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) image (Salimans & Ho 2022, appendix D)
        ("v_prediction", [0.8**0.5 * 5 - 0.2**0.5 * 3, 0.2**0.5 * 5 - 0.8**0.5 * 3]),
    ],
)
def test_target_of_each_prediction_type(prediction_type, expected):
    found = target(scheduler(prediction_type), IMAGES, NOISE, TIMESTEPS)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_implies_the_clean_image(prediction_type):
    noise_scheduler = scheduler(prediction_type)
    noisy = noise_scheduler.add_noise(IMAGES, NOISE, TIMESTEPS)
    perfect = target(noise_scheduler, IMAGES, NOISE, TIMESTEPS)
    found = predicted_images(noise_scheduler, perfect, noisy, TIMESTEPS)
    # a few roundings of numbers below 8, divided by sqrt(alpha_bar) >= 0.44: 4 x 8 x 2^-24 / 0.44
    torch.testing.assert_close(found, IMAGES, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("prediction_type", "gamma", "expected"),
    [
        ("epsilon", 1.0, [1 / 4, 1.0]),  # min(SNR, 1) / SNR
        ("epsilon", 5.0, [1.0, 1.0]),
        ("v_prediction", 1.0, [1 / 5, 0.25 / 1.25]),  # min(SNR, 1) / (SNR + 1)
        ("v_prediction", 5.0, [4 / 5, 0.25 / 1.25]),
        ("sample", 1.0, [1.0, 0.25]),  # min(SNR, 1)
        ("sample", 5.0, [4.0, 0.25]),
    ],
)
def test_min_snr_weight_of_each_prediction_type(prediction_type, gamma, expected):
    weights = min_snr_weights(scheduler(prediction_type), TIMESTEPS, gamma)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_an_error_in_the_image_the_same_in_each_prediction_type(prediction_type):
    """An error d in the image is d sqrt(SNR) in epsilon and d / sqrt(1 - alpha_bar) in v: weighted losses agree."""
    noise_scheduler = scheduler(prediction_type)
    alpha_bar = noise_scheduler.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    factor = {"epsilon": snr, "v_prediction": 1 / (1 - alpha_bar), "sample": torch.ones(2)}[prediction_type]
    weighted = min_snr_weights(noise_scheduler, TIMESTEPS, 2.0).double() * factor
    torch.testing.assert_close(weighted, snr.clamp(max=2.0), rtol=1e-6, atol=0)  # the weights are float32


def test_min_snr_weight_of_pure_noise_is_one():
    noise_scheduler = DDPMScheduler(num_train_timesteps=10, rescale_betas_zero_snr=True)
    assert noise_scheduler.alphas_cumprod[-1] == 0
    assert min_snr_weights(noise_scheduler, torch.tensor([9]), 5.0).item() == 1.0


def test_loss_is_one_number_an_image_and_weighted_after_the_mean():
    prediction = torch.stack([torch.full((1, 2, 2), 6.0), torch.full((1, 2, 2), 8.0)])
    losses = loss_per_image(scheduler("epsilon"), prediction, IMAGES, NOISE, TIMESTEPS, None)
    assert losses.tolist() == [1.0, 9.0]  # (6 - 5)^2 and (8 - 5)^2
    losses = loss_per_image(scheduler("epsilon"), prediction, IMAGES, NOISE, TIMESTEPS, 1.0)
    torch.testing.assert_close(losses, torch.tensor([0.25, 9.0]))
