"""Validation without sampling noise, and pictures from noise that stays the same, whatever the number of processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from finetune import pictures
from finetune.config import Config, ModelConfig
from finetune.evaluation import CHUNK, Interrupted, StopCheck, Validation, _rounds, sample
from finetune.model import load_model
from finetune.objective import predicted_images
from tiny import UNET, tiny_config

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)


class Process:
    """What `_rounds` asks of an Accelerator."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


@pytest.fixture
def validation(tmp_path):
    config = Config.model_validate(tiny_config(tmp_path, tmp_path, validation__images=20))
    unet, noise_scheduler = load_model(ModelConfig(unet=UNET, noise_scheduler={"num_train_timesteps": 100}), None, 0)
    return Validation(list(IMAGES), config, noise_scheduler), unet


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 8, 20, 64])
def test_every_draw_is_made_once_and_all_processes_go_the_same_number_of_rounds(count, processes):
    shares = [list(_rounds(count, Process(index, processes))) for index in range(processes)]
    assert len({len(share) for share in shares}) == 1
    chunks = [chunk for share in shares for chunk in share if chunk is not None]
    assert sorted(draw for chunk in chunks for draw in chunk) == list(range(count))
    # the shapes do not depend on the processes, so neither do the last bits
    assert sorted(map(len, chunks)) == sorted(min(CHUNK, count - start) for start in range(0, count, CHUNK))


def test_timesteps_are_spread_evenly(validation):
    # 20 draws over 100: the middle of each twentieth
    assert validation[0].timesteps.tolist() == list(range(2, 100, 5))


def test_two_evaluations_of_the_same_weights_are_identical(validation):
    (held_out, unet), accelerator = validation, Accelerator(cpu=True)
    torch.manual_seed(1)
    first = held_out.losses(unet, accelerator, lambda: None)
    torch.manual_seed(2)
    second = held_out.losses(unet, accelerator, lambda: None)
    assert first.dtype == np.float64
    assert len(first) == 20
    assert (first == second).all()
    assert unet.training
    with torch.no_grad():
        unet.conv_out.bias.add_(0.1)
    assert not (first == held_out.losses(unet, accelerator, lambda: None)).any()


def test_more_draws_than_images_show_each_at_several_noise_levels(validation):
    """A network that predicts nothing loses what its target is: the mean square of each draw's own noise."""
    (held_out, unet), accelerator = validation, Accelerator(cpu=True)
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    losses = held_out.losses(unet, accelerator, lambda: None)
    assert len(set(losses.tolist())) == 20
    assert losses.mean() == pytest.approx(1, abs=0.16)  # 1,280 squares of a standard normal: standard error 0.04


def test_samples_are_a_function_of_the_seed_and_do_not_depend_on_how_many():
    unet, noise_scheduler = load_model(ModelConfig(unet=UNET), None, 0)
    accelerator = Accelerator(cpu=True)

    def draw(seed, count):
        return sample(unet, noise_scheduler, accelerator, lambda: None, seed, count, 3)

    first = draw(0, 16)
    assert first.shape == (16, 8, 8, 1)
    assert first.dtype == np.uint8
    assert (first == draw(0, 16)).all()
    assert (first[:8] == draw(0, 8)).all()
    assert not (first == draw(1, 16)).all()


def test_an_evaluation_ends_at_the_next_step_after_a_stop(validation):
    (held_out, unet), accelerator = validation, Accelerator(cpu=True)
    asked = []

    def requested():
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Interrupted):
        held_out.losses(unet, accelerator, StopCheck(accelerator, requested))
    assert len(asked) == 3
    assert unet.training


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_clean_image_comes_back_from_a_perfect_prediction(prediction_type):
    from finetune.objective import target

    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    images, noise = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    timesteps = torch.tensor([0, 200, 500, 800])
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    perfect = target(noise_scheduler, images, noise, timesteps)
    found = predicted_images(noise_scheduler, perfect, noisy, timesteps)
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)


def test_a_denoising_strip_has_noise_above_and_predictions_below(validation):
    held_out, unet = validation
    strip = held_out.denoise(unet, torch.device("cpu"))
    assert strip.shape == (2 * CHUNK, 8, 8, 1)
    # at the lowest of eight noise levels the first image is still what it was
    assert np.corrcoef(strip[0].ravel(), IMAGES[0].ravel())[0, 1] > 0.95
    assert abs(np.corrcoef(strip[CHUNK - 1].ravel(), IMAGES[0].ravel())[0, 1]) < 0.6


def test_a_grid_puts_images_row_by_row(tmp_path):
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(pictures.tiled(images))
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    assert (grid[5, 5, 0], grid[5, 70, 0], grid[70, 5, 0], grid[70, 70, 0]) == (10, 20, 30, 255)
    # small images are enlarged by whole pixels: 16 to 64
    assert pictures.tiled(np.zeros((1, 16, 16, 1), np.uint8)).size == (68, 68)
    pictures.save_png(pictures.tiled(images), tmp_path / "new" / "grid.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
