"""What windows and epochs add up to, by numbers worked out by hand and models whose answer is known."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from finetune.metrics import (
    EpochLoss,
    GradientNoiseScale,
    Meters,
    SmoothedLoss,
    Window,
    WindowResult,
    loss_by_timestep,
)
from finetune.windows import Split


def test_window_keeps_position_order_and_drops_padding():
    window = Window(Split(2, 2, 1))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    window.add(torch.tensor([1.0, 2.0]), [parameter])
    window.add(torch.tensor([4.0, 100.0]), [parameter])  # the last is padding
    result = window.close(Accelerator(cpu=True), 3, torch.tensor(7.0))
    assert result.losses.tolist() == [1.0, 2.0, 4.0]
    assert result.grad_norm == 7.0
    assert result.micro_grad_norm is None  # a shorter window says nothing about the noise scale
    assert not result.stop


def test_window_scales_the_first_gradient_to_the_micro_batch_mean():
    # N = 2: Accelerate halved the micro-batch's mean gradient, whose norm was 2 x |(3, 4)| = 10
    window, parameter = Window(Split(2, 2, 1)), torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    window.add(torch.ones(2), [parameter])
    parameter.grad = torch.tensor([30.0, 40.0])
    window.add(torch.ones(2), [parameter])
    assert window.close(Accelerator(cpu=True), 4, torch.tensor(1.0), stop=True) == WindowResult(
        pytest.approx([1.0] * 4), 1.0, 10.0, True
    )


def test_the_micro_batch_gradient_is_that_of_its_mean_loss():
    """Through Accelerate's own accumulation, against autograd on the first micro-batch alone."""
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    network, inputs = torch.nn.Linear(3, 1), torch.randn(4, 3)
    alone = torch.autograd.grad(network(inputs[:2]).square().mean(), network.parameters())
    network = accelerator.prepare(network)
    split = Split(2, 2, 1)
    window, weight = Window(split), 2 * 1 / 4  # N P / n_w
    for micro in inputs.split(2):
        with accelerator.accumulate(network):
            losses = network(micro).square()[:, 0]
            accelerator.backward((weight * losses).sum())
            window.add(losses, network.parameters())
    whole = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    result = window.close(accelerator, 4, whole)
    assert result.micro_grad_norm == pytest.approx(torch.nn.utils.get_total_norm(alone).item(), rel=1e-6)
    fresh = torch.nn.utils.get_total_norm(
        torch.autograd.grad(network(inputs).square().mean(), list(network.parameters()))
    )
    assert result.grad_norm == pytest.approx(fresh.item(), rel=1e-6)


@pytest.mark.parametrize(("losses", "norm"), [([1.0, np.nan], 1.0), ([1.0, np.inf], 1.0), ([1.0, 1.0], np.inf)])
def test_a_window_that_is_not_finite(losses, norm):
    assert not WindowResult(np.array(losses), norm, None, False).finite
    assert WindowResult(np.array([1.0, 2.0]), 1.0, None, False).finite


def test_epoch_loss_is_over_images_and_not_over_updates():
    epoch = EpochLoss()
    epoch.add(np.array([1.0, 1.0, 1.0]))
    epoch.add(np.array([5.0]))
    assert epoch.close() == 2.0  # (3 x 1 + 5) / 4, where the mean over updates would be 3
    epoch.add(np.array([7.0]))
    assert epoch.close() == 7.0


def test_loss_by_timestep():
    ranges = loss_by_timestep(np.array([1.0, 3.0, 8.0]), np.array([0, 249, 999]), 1000)
    assert ranges == {"000-249": 2.0, "750-999": 8.0}


@pytest.mark.parametrize("seed", range(3))
def test_noise_scale_of_a_linear_model(seed):
    """Per-image gradients G + e, e ~ N(0, s^2 I_d): tr(Sigma) / |G|^2 = d s^2 / |G|^2 = 20 x 9 / 4 = 45."""
    rng, dimensions, deviation = np.random.default_rng(seed), 20, 3.0
    gradient = np.zeros(dimensions)
    gradient[0] = 2.0
    noise_scale = GradientNoiseScale()
    for _ in range(4000):
        images = gradient + deviation * rng.standard_normal((64, dimensions))
        small, big = images[:8].mean(0), images.mean(0)
        noise_scale.add((small**2).sum(), (big**2).sum(), 8, 64)
    # the running mean spans about 200 windows; S's relative error there is about 6 %, |G|^2's about 8 %
    assert noise_scale.variance == pytest.approx(180, rel=0.2)
    assert noise_scale.squared_gradient == pytest.approx(4, rel=0.3)
    assert noise_scale.value == pytest.approx(45, rel=0.4)


def test_noise_scale_of_gradients_without_noise_is_zero():
    noise_scale = GradientNoiseScale()
    noise_scale.add(4.0, 4.0, 8, 64)
    assert noise_scale.value == 0.0
    assert noise_scale.squared_gradient == 4.0


def test_smoothed_loss_does_not_move_with_the_draw_of_timesteps():
    """A network whose loss is a function of the timestep alone: once each range was seen, any draw gives its mean."""
    smoothed, rng = SmoothedLoss(), np.random.default_rng(0)
    level = np.linspace(10, 1, 50)
    everything = np.arange(0, 1000, 20)
    smoothed.add(level, everything, 1000)
    values = [smoothed.add(level[t // 20], t, 1000) for t in rng.integers(0, 1000, (30, 8))]
    assert values == pytest.approx([5.5] * 30)  # the mean of 10 .. 1


def test_smoothed_loss_follows_the_level():
    smoothed, rng = SmoothedLoss(), np.random.default_rng(0)
    for level in [1.0] * 200 + [0.5] * 200:
        smoothed.add(level * np.ones(16), rng.integers(0, 1000, 16), 1000)
    assert smoothed.value == pytest.approx(0.5, rel=0.02)


def test_meters_come_back_from_their_state():
    from dataclasses import asdict

    meters = Meters()
    result = WindowResult(np.array([1.0, 2.0]), 3.0, 4.0, False)
    scalars = meters.add_window(result, np.array([10, 900]), 1000, Split(1, 2, 1))
    assert scalars["train/loss"] == 1.5
    assert scalars["train/grad_norm"] == 3.0
    # |G|^2 = (2 x 9 - 1 x 16) / (2 - 1) = 2, S = (16 - 9) / (1 - 1/2) = 14
    assert scalars["train/gradient_noise_scale"] == 7.0
    assert Meters.from_state(asdict(meters)) == meters
