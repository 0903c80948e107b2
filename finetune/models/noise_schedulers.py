"""Noise schedulers that this program can train with: those that noise as DDPM does, at levels that make sense."""

from typing import Any

from diffusers import DDPMScheduler

from finetune.core.errors import UserError, first_line
from finetune.models.checks import check_settings

# At the same betas, each of these shows the network sqrt(alpha) x + sqrt(1 - alpha) noise; they differ in how they
# sample. EDM's scales what the network sees and predicts by sigma_data.
_LIKE_DDPM = {*DDPMScheduler._compatibles} - {"EDMEulerScheduler"}
_EXPECTED = "expected one that noises as DDPM does (DDPMScheduler, DDIMScheduler, PNDMScheduler, ...)"


def check_scheduler(name: str, library: str, scheduler: str, config: dict[str, Any]) -> None:
    """Raise UserError if the noise scheduler of the pipeline `name` would not be the one of training.

    Args:
        library, scheduler: as the pipeline's index gives them.
        config: of the scheduler, where some change what it is: flow matching, EDM's continuous noise levels.
    """
    found = f"model.pretrained: {name}: found the noise scheduler"
    for class_name in (scheduler, config.get("_class_name", scheduler)):
        if library != "diffusers" or class_name not in _LIKE_DDPM:
            raise UserError(f"{found} {library}.{class_name}; {_EXPECTED}")
    if config.get("use_flow_sigmas"):
        raise UserError(f"{found} {scheduler} with use_flow_sigmas (flow matching); {_EXPECTED}")
    if config.get("timestep_type") == "continuous":
        raise UserError(f"{found} {scheduler} with timestep_type continuous (EDM); {_EXPECTED}")


def check_noise_levels(noise_scheduler: DDPMScheduler) -> None:
    """Raise UserError if a noise scheduler's settings cannot be trained with."""
    config, section = noise_scheduler.config, "model.noise_scheduler"
    steps, alphas = config.num_train_timesteps, noise_scheduler.alphas_cumprod
    if type(steps) is not int or steps < 1:
        raise UserError(f"{section}.num_train_timesteps: found {steps!r}; expected a whole number above 0")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{section}.prediction_type: found {config.prediction_type!r}; expected epsilon, v_prediction or sample"
        )
    if len(alphas) != steps:  # diffusers takes the betas as they are
        raise UserError(
            f"{section}.trained_betas: found {len(alphas)} betas; expected {steps}, one for each of num_train_timesteps"
        )
    betas = noise_scheduler.betas
    if not bool(((betas >= 0) & (betas <= 1)).all()):
        raise UserError(
            f"{section}: found betas from {betas.min():g} to {betas.max():g}; expected them from 0 to 1 (beta_start, "
            "beta_end, trained_betas)"
        )
    if config.prediction_type == "epsilon" and alphas.min() == 0:
        raise UserError(
            f"{section}: found a last timestep of nothing but noise (zero terminal SNR) with epsilon prediction, which "
            "has no image to find there; set prediction_type to v_prediction or sample, or rescale_betas_zero_snr to "
            "false"
        )


def build_noise_scheduler(pretrained: dict[str, Any], overrides: dict[str, Any]) -> DDPMScheduler:
    """The scheduler that noises images in training, from a pretrained config and what the run's config changes in it.

    Raises:
        UserError: if there is no such scheduler, or its noise levels cannot be trained.
    """
    check_settings("model.noise_scheduler", overrides, DDPMScheduler)
    try:
        noise_scheduler = DDPMScheduler.from_config({**pretrained, **overrides})
    except Exception as error:
        raise UserError(f"model.noise_scheduler: DDPMScheduler cannot be built: {first_line(error)}") from error
    check_noise_levels(noise_scheduler)
    return noise_scheduler
