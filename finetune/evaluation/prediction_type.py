"""Whether a pretrained network predicts what its pipeline says: noise or velocity.

With x_t = a x + s e (Salimans & Ho 2022, appendix D), the velocity v = a e - s x is almost the negative image at high
noise, where a is small, while a network of noise almost repeats its input. So a wrong
`prediction_type`, a common mistake, shows in one step.
"""

from typing import NamedTuple

import numpy as np
import torch

from finetune.core.errors import UserError
from finetune.core.kind import Kind
from finetune.core.randomness import noise
from finetune.data.batches import Batches
from finetune.evaluation.passes import evaluating, predict_noised
from finetune.evaluation.rounds import chunks

LEVELS = 0.05, 0.02, 0.01, 0.005  # a^2, the signal's share of the variance, at the timesteps that are looked at
DRAWS = 16
_EXPLAINED, _UNEXPLAINED, _SMALLER = 0.4, 0.8, 0.85  # error of a target that is predicted, is not, and for v
_OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}


class Readings(NamedTuple):
    """One-step errors of a network at high noise, as shares of the target's mean square; 1 for an output of zeros."""

    epsilon: float
    v_prediction: float
    image: float  # slope of the output over the clean image: about -1 for velocity, 0 for noise

    @property
    def shown(self) -> str | None:
        """What the network evidently predicts; None where that is not clear, as of one that is hardly trained.

        Noise is explained well by any network of noise, since its input is nearly that. Velocity has the negative
        image in it, which can be recovered only in part at this noise: a slightly smaller error with its sign will do.
        """
        if self.epsilon < _EXPLAINED and self.v_prediction > _UNEXPLAINED:
            return "epsilon"
        if self.epsilon > _EXPLAINED and self.v_prediction < _SMALLER and self.image < -0.1:
            return "v_prediction"
        return None


@torch.no_grad()
def readings(kind: Kind, examples: Batches, seed: int, device: torch.device) -> Readings:
    """Both readings of the network's outputs for some images, with their conditions."""
    alphas = kind.noise_scheduler.alphas_cumprod.cpu().numpy()
    steps = [int(np.abs(alphas - level).argmin()) for level in LEVELS]
    sums = torch.zeros(6, dtype=torch.float64)
    with evaluating(kind.network):
        for draws in chunks(DRAWS, [examples.shape(draw % len(examples)) for draw in range(DRAWS)]):
            shape = examples.shape(draws[0] % len(examples))
            drawn = torch.stack([noise(seed, 0, draw, shape, "prediction type") for draw in draws])
            timesteps = torch.tensor([steps[draw % len(steps)] for draw in draws])
            batch = {"noise": drawn, "timesteps": timesteps}
            batch |= examples.shown([draw % len(examples) for draw in draws], False)
            clean, drawn, timesteps, _, output = predict_noised(kind, batch, device)
            velocity = kind.noise_scheduler.get_velocity(clean, drawn, timesteps)
            sums += (
                torch.stack(
                    [
                        (output - drawn).square().sum(),
                        drawn.square().sum(),
                        (output - velocity).square().sum(),
                        velocity.square().sum(),
                        (output * clean).sum(),
                        clean.square().sum(),
                    ]
                )
                .double()
                .cpu()
            )
    return Readings(*(float(sums[place] / sums[place + 1].clamp(min=1e-12)) for place in (0, 2, 4)))


def check_prediction_type(kind: Kind, examples: Batches, seed: int, device: torch.device) -> None:
    """Refuse a network that evidently predicts something else than its noise scheduler says, before it is trained.

    Raises:
        UserError: with the key that has to be set.
    """
    own = kind.noise_scheduler.config.prediction_type
    if own not in _OTHER:
        return
    found = readings(kind, examples, seed, device)
    if found.shown == _OTHER[own]:
        errors = {"epsilon": found.epsilon, "v_prediction": found.v_prediction}
        raise UserError(
            f"model.noise_scheduler.prediction_type: found {own}, but the network predicts {found.shown}: at high "
            f"noise its error is {errors[own]:.2f} of the target read as {own}, {errors[found.shown]:.2f} read as "
            f"{found.shown}; set model.noise_scheduler.prediction_type={found.shown}"
        )
