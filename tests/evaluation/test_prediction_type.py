"""Networks of noise and of velocity are told apart in one step; what cannot be told is let through."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.core.errors import UserError
from finetune.evaluation.prediction_type import check_prediction_type, readings

CPU = torch.device("cpu")
SHAPE = (4, 8, 8)


class Examples:
    """Latents of a variance."""

    def __init__(self, variance, mean=0.0):
        draws = np.random.default_rng(0).standard_normal((16, *SHAPE))
        self.latents = torch.from_numpy(draws * variance**0.5 + mean).float()

    def __len__(self):
        return len(self.latents)

    def shape(self, image):
        return SHAPE

    def shown(self, images, dropped):
        return {"latents": self.latents[images]}


class Network(torch.nn.Module):
    """Answers with what it is told to, of the clean latents that it was given beside the noisy ones."""

    def __init__(self, answer, scheduler):
        super().__init__()
        self.answer, self.scheduler = answer, scheduler

    def forward(self, noisy, timesteps, clean):
        alphas = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        a, s = alphas.sqrt(), (1 - alphas).sqrt()
        return SimpleNamespace(sample=self.answer(noisy, clean, (noisy - a * clean) / s, a, s))


def kind_of(answer, prediction_type="epsilon", **options):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", beta_end=0.012, **options)
    return SimpleNamespace(
        network=Network(answer, scheduler),
        noise_scheduler=scheduler,
        inputs=lambda batch: (batch["latents"], {"clean": batch["latents"]}),
    )


def seeing(share):
    """Networks that know so much of the image: x' = share x, and e' = (x_t - a x') / s as follows from it."""
    return {
        "epsilon": lambda noisy, x, e, a, s: (noisy - a * share * x) / s,
        "v_prediction": lambda noisy, x, e, a, s: a * (noisy - a * share * x) / s - s * share * x,
    }


def shown(answer, variance=1.0, **options):
    return readings(kind_of(answer, **options), Examples(variance), 0, CPU).shown


def test_errors_of_perfect_networks_and_of_silent_ones():
    perfect = {name: readings(kind_of(answer), Examples(1.0), 0, CPU) for name, answer in seeing(1.0).items()}
    assert perfect["epsilon"].epsilon == pytest.approx(0, abs=1e-6)
    assert perfect["v_prediction"].v_prediction == pytest.approx(0, abs=1e-6)
    # v - e = (a - 1) e - s x, of mean square (1 - a)^2 + s^2 for variance 1: with a^2 of 0.05, 0.02, 0.01, 0.005
    # 1.55, 1.72, 1.80, 1.86
    assert perfect["v_prediction"].epsilon == pytest.approx(1.73, abs=0.1)
    assert perfect["v_prediction"].image == pytest.approx(-0.99, abs=0.05)  # s
    silent = readings(kind_of(lambda noisy, *_: 0 * noisy), Examples(1.0), 0, CPU)
    assert silent == pytest.approx((1, 1, 0))


@settings(deadline=None, max_examples=40)
@given(st.floats(0.3, 1.0), st.floats(0.3, 2.0))
def test_networks_that_see_something_of_the_image_are_told_apart(share, variance):
    for name, answer in seeing(share).items():
        assert shown(answer, variance) == name


@settings(deadline=None, max_examples=40)
@given(st.floats(0.0, 1.2), st.floats(0.01, 2.0), st.integers(0, 10))
def test_no_network_of_noise_is_taken_for_one_of_velocity(gain, variance, seed):
    """However little it is trained: nothing, a part of its input, all of it, and noise of its own beside that."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randn(SHAPE, generator=generator) * (seed / 10)
    assert shown(lambda noisy, *_: gain * noisy, variance) != "v_prediction"
    assert shown(lambda noisy, *_: gain * noisy + extra, variance) != "v_prediction"
    assert shown(seeing(gain)["epsilon"], variance) != "v_prediction"


@settings(deadline=None, max_examples=40)
@given(st.floats(0.0, 1.0), st.floats(0.01, 2.0))
def test_no_network_of_velocity_is_taken_for_one_of_noise(share, variance):
    assert shown(seeing(share)["v_prediction"], variance) != "epsilon"


@pytest.mark.parametrize("own", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("network", ["epsilon", "v_prediction"])
def test_a_wrong_mark_is_one_line_with_the_key_to_set(own, network):
    kind = kind_of(seeing(0.6)[network], own)
    if own == network:
        check_prediction_type(kind, Examples(1.0), 0, CPU)
        return
    with pytest.raises(UserError) as caught:
        check_prediction_type(kind, Examples(1.0), 0, CPU)
    (line,) = caught.value.problems
    assert line.startswith(f"model.noise_scheduler.prediction_type: found {own}, but the network predicts {network}: ")
    assert line.endswith(f"; set model.noise_scheduler.prediction_type={network}")


def test_networks_of_images_are_not_judged():
    check_prediction_type(kind_of(lambda noisy, x, *_: x, "sample"), Examples(1.0), 0, CPU)
    check_prediction_type(kind_of(lambda *_: 1 / 0, "sample"), Examples(1.0), 0, CPU)


def test_a_schedule_without_signal_at_its_end_is_read_too():
    options = {"rescale_betas_zero_snr": True}
    for name, answer in seeing(0.5).items():
        assert shown(answer, prediction_type="v_prediction", **options) == name
