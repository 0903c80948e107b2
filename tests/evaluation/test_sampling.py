"""Samples by DDIM from noise that the seed decides, however many there are."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from finetune.config.inputs import ModelConfig
from finetune.core.errors import UserError
from finetune.core.randomness import noise
from finetune.core.shapes import Shape
from finetune.core.stopping import Interrupted, StopCheck
from finetune.evaluation.sampling import ImageSampler, check_sampling
from finetune.models.load import load_kind
from harness.configs import UNET
from harness.faults import RequestedAt


@pytest.fixture(scope="module")
def kind():
    return load_kind(ModelConfig(unet=UNET), None, 0)


def draw(kind, seed, count, steps=3):
    sampler = ImageSampler(kind, Accelerator(cpu=True), lambda: None, seed, steps)
    return np.stack(sampler.sample([None] * count, [Shape(8, 8)] * count))


def test_samples_depend_on_the_seed_and_not_on_how_many_are_drawn(kind):
    first = draw(kind, 0, 16)
    assert first.shape == (16, 8, 8, 1)
    assert first.dtype == np.uint8
    assert (first == draw(kind, 0, 16)).all()
    assert (first[:8] == draw(kind, 0, 8)).all()
    assert not (first == draw(kind, 1, 16)).all()
    assert kind.network.training


def test_samples_are_those_of_the_exported_pipeline(kind, monkeypatch):
    """diffusers' own DDIMPipeline, handed the same starting noise."""
    start = torch.stack([noise(5, 0, index, (1, 8, 8), "samples") for index in range(8)])
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: start)
    pipeline = DDIMPipeline(kind.network, DDIMScheduler.from_config(kind.noise_scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    kind.network.eval()
    images = pipeline(batch_size=8, num_inference_steps=3, output_type="np").images
    kind.network.train()
    assert (draw(kind, 5, 8) == (images * 255).round()).all()


def test_samples_of_a_network_that_knows_the_image_are_that_image():
    """Whatever it starts from, DDIM ends at the image that the network always predicts: -0.6 is pixel 51."""
    perfect = load_kind(ModelConfig(unet=UNET, noise_scheduler={"prediction_type": "sample"}), None, 0)
    with torch.no_grad():
        perfect.network.conv_out.weight.zero_()
        perfect.network.conv_out.bias.fill_(-0.6)
    assert np.unique(draw(perfect, 0, 2)).tolist() == [51]


def test_sampling_ends_at_the_next_step_after_a_stop(kind):
    accelerator, requested = Accelerator(cpu=True), RequestedAt(3)
    with pytest.raises(Interrupted):
        ImageSampler(kind, accelerator, StopCheck(requested), 0, 5).sample([None] * 8, [Shape(8, 8)] * 8)
    assert requested.asked == 3
    assert kind.network.training


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (20, {"num_train_timesteps": 20}),
        (1, {"num_train_timesteps": 1}),
        (10, {"num_train_timesteps": 20, "steps_offset": 1}),  # the last is 9 x 2 + 1 = 19
        (40, {"timestep_spacing": "trailing"}),
        (40, {"timestep_spacing": "linspace"}),
        (2, {"num_train_timesteps": 2, "trained_betas": [0.1, 0.2]}),
        (40, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        (40, {"variance_type": "fixed_large"}),
        (40, {"thresholding": True}),
    ],
)
def test_settings_that_can_be_sampled_with_are_accepted(steps, settings):
    before = torch.get_rng_state()
    check_sampling(DDPMScheduler(**settings), steps)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("steps", "settings", "line"),
    [
        (40, {"num_train_timesteps": 20}, "samples.inference_steps: found 40; expected at most 20, the num_train"),
        # the last is 19 x 1 + 1 = 20, and there are 0 to 19
        (20, {"num_train_timesteps": 20, "steps_offset": 1}, "steps_offset 1, variance_type fixed_small: index 20 is"),
        (40, {"steps_offset": -1}, "steps_offset -1, variance_type fixed_small: found a timestep -1, expected 0"),
        (40, {"timestep_spacing": "nonsense"}, "timestep_spacing nonsense, steps_offset 0, "),
        (40, {"beta_schedule": "sigmoid"}, "DDIMScheduler cannot sample in 40 steps with beta_schedule sigmoid"),
        (40, {"beta_start": 0.0}, "found a pixel nan, expected finite ones"),
        (40, {"variance_type": "learned_range"}, "DDPMScheduler cannot sample in 40 steps with beta_schedule linear"),
        (40, {"thresholding": True, "dynamic_thresholding_ratio": 2}, "quantile() q must be in the range [0, 1]"),
    ],
)
def test_settings_that_cannot_be_sampled_with_are_refused(steps, settings, line):
    with pytest.raises(UserError) as failure:
        check_sampling(DDPMScheduler(**settings), steps)
    (problem,) = failure.value.problems
    assert line in problem
    assert "\n" not in problem
