"""The objective: targets, min-SNR weights, and the unreduced loss of each image."""

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def target(
    noise_scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, shape of `images` (b, C, H, W), by the noise scheduler's own prediction type."""
    match noise_scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return noise_scheduler.get_velocity(images, noise, timesteps)
        case "sample":
            return images
        case other:
            raise ValueError(f"prediction_type {other!r}: expected epsilon, v_prediction or sample")


def predicted_images(
    noise_scheduler: DDPMScheduler, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The clean images that a prediction implies, (b, C, H, W); not clamped to [-1, 1].

    With x_t = a x + s e: x = (x_t - s e) / a, or a x_t - s v (Salimans & Ho 2022, appendix D).
    """
    alphas = noise_scheduler.alphas_cumprod.to(noisy.device)[timesteps].view(-1, 1, 1, 1)
    match noise_scheduler.config.prediction_type:
        case "epsilon":
            return (noisy - (1 - alphas).sqrt() * prediction) / alphas.sqrt()
        case "v_prediction":
            return alphas.sqrt() * noisy - (1 - alphas).sqrt() * prediction
        case _:
            return prediction


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """The min-SNR-gamma weight of each timestep, shape (b,).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy": the loss on the image
    weighs min(SNR, gamma). The same loss on epsilon is that over SNR, and on v that over SNR + 1.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    match noise_scheduler.config.prediction_type:
        case "epsilon":
            return (snr_gamma / snr).clamp(max=1.0)  # min(snr, gamma) / snr, and 1 where the SNR is 0
        case "v_prediction":
            return snr.clamp(max=snr_gamma) / (snr + 1)
        case _:
            return snr.clamp(max=snr_gamma)


def loss_per_image(
    noise_scheduler: DDPMScheduler,
    prediction: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None,
) -> torch.Tensor:
    """Squared error of each image, mean over C, H and W, times its min-SNR weight where asked for; shape (b,).

    Not reduced over the batch: an image's weight depends on the window it is in.
    """
    error = prediction - target(noise_scheduler, images, noise, timesteps)
    losses = error.square().flatten(1).mean(1)
    return losses if snr_gamma is None else losses * min_snr_weights(noise_scheduler, timesteps, snr_gamma)
