"""The moving average of the weights: how it warms up, and where it is put in place of the weights."""

import pytest
import torch

from finetune.config.updates import EMAConfig
from finetune.models.ema import averaged_weights, make_ema


def test_the_decay_warms_up_to_its_limit():
    """decay(u) = min(1 - (1 + u)^-power, decay), counted from 0: the first update copies."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -3.0]))
    ema = make_ema([weight], EMAConfig(decay=0.5, power=0.75))
    expected = None
    for update in range(6):
        with torch.no_grad():
            weight.add_(1.0)
        ema.step([weight])
        decay = min(1 - (1 + update) ** -0.75, 0.5)
        current = weight.detach().double()
        expected = current if expected is None else decay * expected + (1 - decay) * current
    # six steps of three roundings of at most 2^-24 each
    torch.testing.assert_close(ema.shadow_params[0].double(), expected, rtol=18 * 2**-24, atol=0)


def test_no_average_where_it_is_disabled():
    assert make_ema([torch.nn.Parameter(torch.zeros(1))], EMAConfig(enabled=False)) is None


def test_averaged_weights_are_put_back_even_after_an_error():
    weight = torch.nn.Parameter(torch.ones(2))
    ema = make_ema([weight], EMAConfig())
    ema.step([weight])
    with torch.no_grad():
        weight.add_(1.0)

    def fail_inside():
        with averaged_weights([weight], ema):
            assert weight.tolist() == [1.0, 1.0]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert weight.tolist() == [2.0, 2.0]


def test_without_an_average_the_weights_stay():
    weight = torch.nn.Parameter(torch.ones(2))
    with averaged_weights([weight], None):
        assert weight.tolist() == [1.0, 1.0]
