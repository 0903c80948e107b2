"""One update's losses and gradient norms, by numbers worked out by hand and through Accelerate's own accumulation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState

from finetune.core.batch import BatchLayout
from finetune.core.dealing import deal_by_shape, deal_evenly
from finetune.training import window as window_module
from finetune.training.window import Window, WindowResult


def test_losses_are_in_the_order_of_positions_without_padding():
    window = Window(deal_evenly(3, BatchLayout(2, 2, 1)), full=False)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    window.add(torch.tensor([1.0, 2.0]), [parameter])
    window.add(torch.tensor([4.0, 100.0]), [parameter])  # the last is padding
    result = window.close(Accelerator(cpu=True), torch.tensor(7.0))
    assert result.losses.tolist() == [1.0, 2.0, 4.0]
    assert result.grad_norm == 7.0
    assert result.micro_grad_norm is None  # a shorter window says nothing about the noise scale
    assert not result.stop


def test_losses_of_two_processes_are_put_in_the_order_of_positions(monkeypatch):
    """Micro-batch kP + r is micro-step k of process r: process 0 has positions 0, 1, 4, 5, process 1 has 2, 3, 6, 7."""
    window, accelerator = Window(deal_evenly(8, BatchLayout(2, 2, 2))), Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    for gradient, losses in (([3.0, 4.0], [0.0, 1.0]), ([9.0, 9.0], [4.0, 5.0])):
        parameter.grad = torch.tensor(gradient)
        window.add(torch.tensor(losses), [parameter])

    def with_the_other_process(mine):
        # its losses, the norm after the update, the norm of its first micro-batch, and that it was told to stop
        return torch.cat([mine, torch.tensor([2.0, 3.0, 6.0, 7.0, 20.0, 1.0, 1.0])])

    monkeypatch.setattr(accelerator, "gather", with_the_other_process)
    result = window.close(accelerator, torch.tensor(20.0))
    assert result.losses.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert result.grad_norm == 20.0
    # |(3, 4)| = 5 here and 1 there, each half of its micro-batch's: 2 sqrt((25 + 1) / 2)
    assert result.micro_grad_norm == pytest.approx(2 * 13**0.5)
    assert result.stop


def test_the_first_gradient_of_a_sharded_network_is_of_all_processes(monkeypatch):
    """It is averaged over the processes at once: an image weighs N P / 8 = 1/2, halved by Accelerate and by P."""
    monkeypatch.setattr(window_module, "DTensor", torch.Tensor)  # as its norm is there
    window, accelerator = Window(deal_evenly(8, BatchLayout(2, 2, 2))), Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    for gradient in ([3.0, 4.0], [9.0, 9.0]):
        parameter.grad = torch.tensor(gradient)
        window.add(torch.ones(2), [parameter])
    monkeypatch.setattr(accelerator, "gather", lambda mine: torch.cat([mine, mine]))
    result = window.close(accelerator, torch.tensor(20.0))
    # |(3, 4)| = 5 is 1/8 of the sum of four images' gradients; their mean is 1/4 of it
    assert result.micro_grad_norm == 10.0
    assert result.micro_batch == 4.0


@pytest.mark.parametrize("scale", [1, 1024], ids=["float32", "fp16"])
def test_the_first_gradient_is_scaled_to_its_micro_batch_mean(scale):
    # N = 2: Accelerate halved the micro-batch's mean gradient, whose norm was 2 x |(3, 4)| = 10, and fp16 scaled it
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = None if scale == 1 else SimpleNamespace(get_scale=lambda: float(scale))
    window, parameter = Window(deal_evenly(4, BatchLayout(2, 2, 1))), torch.nn.Parameter(torch.zeros(2))
    parameter.grad = scale * torch.tensor([3.0, 4.0])
    window.add(torch.ones(2), [parameter])
    parameter.grad = scale * torch.tensor([30.0, 40.0])
    window.add(torch.ones(2), [parameter])
    result = window.close(accelerator, torch.tensor(1.0), stop=True)
    assert result.losses.tolist() == [1.0] * 4
    assert result[1:] == (1.0, 10.0, True, 2.0)


def test_the_micro_batch_gradient_is_that_of_its_mean_loss():
    """Through Accelerate's own accumulation, against autograd on the first micro-batch alone."""
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    network, inputs = torch.nn.Linear(3, 1), torch.randn(4, 3)
    alone = torch.autograd.grad(network(inputs[:2]).square().mean(), network.parameters())
    network = accelerator.prepare(network)
    window, weight = Window(deal_evenly(4, BatchLayout(2, 2, 1))), 2 * 1 / 4  # N P / n_w
    for micro in inputs.split(2):
        with accelerator.accumulate(network):
            losses = network(micro).square()[:, 0]
            accelerator.backward((weight * losses).sum())
            window.add(losses, network.parameters())
    accumulated = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    result = window.close(accelerator, accumulated)
    assert result.micro_grad_norm == pytest.approx(torch.nn.utils.get_total_norm(alone).item(), rel=1e-6)
    at_once = torch.autograd.grad(network(inputs).square().mean(), list(network.parameters()))
    assert result.grad_norm == pytest.approx(torch.nn.utils.get_total_norm(at_once).item(), rel=1e-6)


def test_losses_of_ragged_micro_batches_are_put_at_their_places(monkeypatch):
    """Shapes 0 1 0 1 0 1 0 0 in micro-batches of at most 4 on two processes: (0 2) (4 6) here, (1 3 5) (7) there."""
    window, accelerator = Window(deal_by_shape([0, 1, 0, 1, 0, 1, 0, 0], BatchLayout(4, 1, 2))), Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    for gradient, losses in (([3.0, 4.0], [0.0, 2.0]), ([9.0, 9.0], [4.0, 6.0])):
        parameter.grad = torch.tensor(gradient)
        window.add(torch.tensor(losses), [parameter])
    monkeypatch.setattr(
        accelerator,
        "gather",
        lambda mine: torch.cat([mine, torch.tensor([1.0, 3.0, 5.0, 7.0, 20.0, 1.0, 0.0])]),
    )
    result = window.close(accelerator, torch.tensor(20.0))
    assert result.losses.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    # An image weighs K P / 8 = 1/2 and Accelerate halves it: the first micro-batches of 2 and of 3 left 2/4 and 3/4 of
    # their means, so their own norms are 2 x 5 and 4/3 x 1
    assert result.micro_grad_norm == pytest.approx(((10**2 + (4 / 3) ** 2) / 2) ** 0.5)
    assert result.micro_batch == pytest.approx(2 / (1 / 2 + 1 / 3))


def test_a_process_with_fewer_images_than_micro_steps(monkeypatch):
    """Shapes 0 1 1 on two processes: (0) (1) here, (2) and padding there, whose loss is left out."""
    window, accelerator = Window(deal_by_shape([0, 1, 1], BatchLayout(2, 2, 2)), full=False), Accelerator(cpu=True)
    for loss in (5.0, 6.0):
        window.add(torch.tensor([loss]), [torch.nn.Parameter(torch.zeros(1))])
    other = torch.tensor([7.0, 99.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr(accelerator, "gather", lambda mine: torch.cat([mine, other]))
    result = window.close(accelerator, torch.tensor(1.0))
    assert result.losses.tolist() == [5.0, 6.0, 7.0]
    assert result.micro_grad_norm is None


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
    assert WindowResult(np.array(losses), norm, None, False, 1.0).finite == finite
