"""One update's losses and gradient norms, by numbers worked out by hand and through Accelerate's own accumulation."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from finetune.core.batch import BatchLayout
from finetune.training.window import Window, WindowResult


def test_losses_are_in_the_order_of_positions_without_padding():
    window = Window(BatchLayout(2, 2, 1))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    window.add(torch.tensor([1.0, 2.0]), [parameter])
    window.add(torch.tensor([4.0, 100.0]), [parameter])  # the last is padding
    result = window.close(Accelerator(cpu=True), 3, torch.tensor(7.0))
    assert result.losses.tolist() == [1.0, 2.0, 4.0]
    assert result.grad_norm == 7.0
    assert result.micro_grad_norm is None  # a shorter window says nothing about the noise scale
    assert not result.stop


def test_losses_of_two_processes_are_put_in_the_order_of_positions(monkeypatch):
    """Micro-batch kP + r is micro-step k of process r: process 0 has positions 0, 1, 4, 5, process 1 has 2, 3, 6, 7."""
    window, accelerator = Window(BatchLayout(2, 2, 2)), Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    for gradient, losses in (([3.0, 4.0], [0.0, 1.0]), ([9.0, 9.0], [4.0, 5.0])):
        parameter.grad = torch.tensor(gradient)
        window.add(torch.tensor(losses), [parameter])

    def with_the_other_process(mine):
        # its losses, the norm after the update, the norm of its first micro-batch, and that it was told to stop
        return torch.cat([mine, torch.tensor([2.0, 3.0, 6.0, 7.0, 20.0, 1.0, 1.0])])

    monkeypatch.setattr(accelerator, "gather", with_the_other_process)
    result = window.close(accelerator, 8, torch.tensor(20.0))
    assert result.losses.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert result.grad_norm == 20.0
    # |(3, 4)| = 5 here and 1 there, each half of its micro-batch's: 2 sqrt((25 + 1) / 2)
    assert result.micro_grad_norm == pytest.approx(2 * 13**0.5)
    assert result.stop


def test_the_first_gradient_is_scaled_to_its_micro_batch_mean():
    # N = 2: Accelerate halved the micro-batch's mean gradient, whose norm was 2 x |(3, 4)| = 10
    window, parameter = Window(BatchLayout(2, 2, 1)), torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    window.add(torch.ones(2), [parameter])
    parameter.grad = torch.tensor([30.0, 40.0])
    window.add(torch.ones(2), [parameter])
    result = window.close(Accelerator(cpu=True), 4, torch.tensor(1.0), stop=True)
    assert result.losses.tolist() == [1.0] * 4
    assert result[1:] == (1.0, 10.0, True)


def test_the_micro_batch_gradient_is_that_of_its_mean_loss():
    """Through Accelerate's own accumulation, against autograd on the first micro-batch alone."""
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    network, inputs = torch.nn.Linear(3, 1), torch.randn(4, 3)
    alone = torch.autograd.grad(network(inputs[:2]).square().mean(), network.parameters())
    network = accelerator.prepare(network)
    window, weight = Window(BatchLayout(2, 2, 1)), 2 * 1 / 4  # N P / n_w
    for micro in inputs.split(2):
        with accelerator.accumulate(network):
            losses = network(micro).square()[:, 0]
            accelerator.backward((weight * losses).sum())
            window.add(losses, network.parameters())
    accumulated = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    result = window.close(accelerator, 4, accumulated)
    assert result.micro_grad_norm == pytest.approx(torch.nn.utils.get_total_norm(alone).item(), rel=1e-6)
    at_once = torch.autograd.grad(network(inputs).square().mean(), list(network.parameters()))
    assert result.grad_norm == pytest.approx(torch.nn.utils.get_total_norm(at_once).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "norm", "finite"),
    [
        ([1.0, 2.0], 1.0, True),
        ([1.0, np.nan], 1.0, False),
        ([1.0, np.inf], 1.0, False),
        ([1.0, 1.0], np.inf, False),
        ([1.0, 1.0], np.nan, False),
    ],
)
def test_finite_only_if_every_loss_and_the_norm_are(losses, norm, finite):
    assert WindowResult(np.array(losses), norm, None, False).finite == finite
