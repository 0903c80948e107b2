"""Windows of losses whose true mean is known: level x what a noise level costs x the noise of an image."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from finetune.core.randomness import GOLDEN_RATIO_FRACTION

TIMESTEPS = 1000
IMAGE_NOISE = 0.4  # relative standard deviation of an image's loss within its noise level, as on the digits
NOISE_LEVELS = {  # mean loss by timestep, relative to their mean
    "v_prediction": np.interp(np.arange(TIMESTEPS), [0, 50, 300, 1000], [2.1, 1.1, 0.7, 1.7]),  # the digits'
    "epsilon": 0.002 + 1 / (1 + (np.arange(TIMESTEPS) / 30) ** 1.5),  # nearly all at low noise
}
for _curve in NOISE_LEVELS.values():
    _curve /= _curve.mean()

UPDATES = 300
FALLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # the level of each update
    "none": lambda step: np.ones(len(step)),
    "exponential": lambda step: np.exp(-step / 80),
    "exponential to a floor": lambda step: 0.2 + 0.8 * np.exp(-step / 30),
    "step to a half": lambda step: np.where(step < 150, 1.0, 0.5),
    "power law": lambda step: (1 + step) ** -0.5,
    "from scratch": lambda step: 0.12 + np.exp(-step / 1.5) + 0.3 * np.exp(-step / 40),
}


class SimulatedWindow(NamedTuple):
    losses: np.ndarray
    timesteps: np.ndarray
    level: float  # the true mean loss


def simulate(
    fall: str, images: int, seed: int, noise_levels: str = "v_prediction", sampling: str = "stratified"
) -> Iterator[SimulatedWindow]:
    """A run of UPDATES windows, twenty an epoch."""
    rng, shape = np.random.default_rng(seed), IMAGE_NOISE**-2
    for step, level in enumerate(FALLS[fall](np.arange(UPDATES))):
        if step % 20 == 0:
            offset, places = rng.random(), np.arange(images)
        fractions = rng.random(images) if sampling == "uniform" else (offset + places * GOLDEN_RATIO_FRACTION) % 1
        places, timesteps = places + images, (TIMESTEPS * fractions).astype(np.int64)
        noise = rng.gamma(shape, 1 / shape, images)
        yield SimulatedWindow(level * NOISE_LEVELS[noise_levels][timesteps] * noise, timesteps, level)
