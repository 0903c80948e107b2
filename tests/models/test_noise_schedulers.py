"""Noise schedulers that are trained with are those that noise as DDPM does; wrong settings are refused in one line."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from finetune.core.errors import UserError
from finetune.models.noise_schedulers import _LIKE_DDPM, check_noise_levels, check_scheduler


@pytest.mark.parametrize("name", sorted(_LIKE_DDPM - {"DPMSolverSDEScheduler"}))  # which needs a package of its own
def test_a_scheduler_that_is_accepted_shows_the_network_what_ddpm_does(name):
    """At its first timestep, after its own scaling of the input."""
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    ddpm, other = DDPMScheduler(**betas), getattr(diffusers, name).from_config(betas | {"timestep_spacing": "linspace"})
    other.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(1, 1, 4, 4, generator=generator) for _ in range(2))
    first = other.timesteps[:1]
    found = other.scale_model_input(other.add_noise(images, noise, first), first[0])
    # a few roundings of numbers below 4: 4 x 4 x 2^-24, and as much again for sigma = sqrt((1 - alpha) / alpha)
    torch.testing.assert_close(found, ddpm.add_noise(images, noise, first.long()), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("library", "scheduler", "config", "line"),
    [
        ("diffusers", "EDMEulerScheduler", {}, "diffusers.EDMEulerScheduler;"),
        ("diffusers", "EDMDPMSolverMultistepScheduler", {}, "diffusers.EDMDPMSolverMultistepScheduler;"),
        ("diffusers", "FlowMatchEulerDiscreteScheduler", {}, "diffusers.FlowMatchEulerDiscreteScheduler;"),
        ("diffusers", "ScoreSdeVeScheduler", {}, "diffusers.ScoreSdeVeScheduler;"),
        ("diffusers", "KarrasVeScheduler", {}, "diffusers.KarrasVeScheduler;"),
        ("mine", "DDPMScheduler", {}, "mine.DDPMScheduler;"),
        ("diffusers", "DDPMScheduler", {"_class_name": "EDMEulerScheduler"}, "diffusers.EDMEulerScheduler;"),
        ("diffusers", "UniPCMultistepScheduler", {"use_flow_sigmas": True}, "with use_flow_sigmas (flow matching);"),
        ("diffusers", "EulerDiscreteScheduler", {"timestep_type": "continuous"}, "with timestep_type continuous (EDM)"),
    ],
)
def test_a_scheduler_that_noises_otherwise_is_refused(library, scheduler, config, line):
    with pytest.raises(UserError) as failure:
        check_scheduler("folder", library, scheduler, config)
    (problem,) = failure.value.problems
    assert problem.startswith("model.pretrained: folder: found the noise scheduler ")
    assert line in problem
    assert "expected one that noises as DDPM does" in problem


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_a_spacing_of_the_inference_steps_is_accepted(flag):
    check_scheduler("folder", "diffusers", "DPMSolverMultistepScheduler", {flag: True, "use_flow_sigmas": False})


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps: found 0; expected a whole number above 0"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: found 'flow_prediction'; expected epsilon, v_pr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas: found 2 betas; expected 1000, one for each"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 1}, "trained_betas: found 2 betas; expected 1, one"),
        ({"beta_end": 2.0}, "found betas from 0.0001 to 2; expected them from 0 to 1"),
        ({"beta_start": -0.1}, "found betas from -0.1 to 0.02; expected them from 0 to 1"),
        ({"beta_end": float("nan")}, "found betas from nan to nan; expected them from 0 to 1"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR) with epsilon prediction, which has no image"),
        ({"beta_end": 1.0}, "zero terminal SNR) with epsilon prediction"),
    ],
)
def test_settings_without_a_noise_level_for_each_timestep_are_refused(settings, line):
    with pytest.raises(UserError) as failure:
        check_noise_levels(DDPMScheduler(**settings))
    (problem,) = failure.value.problems
    assert problem.startswith("model.noise_scheduler")
    assert line in problem


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_accepted_where_the_image_can_be_found(prediction_type):
    check_noise_levels(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type))
