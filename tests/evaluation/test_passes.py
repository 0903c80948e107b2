"""A pass through the network that is evaluated: its mode, and the pixels that come out."""

import pytest
import torch
from torch import nn

from finetune.evaluation.passes import as_pixels, evaluating


def test_the_network_is_in_training_mode_again_after_an_error():
    network = nn.Dropout(0.5)

    def fail_inside():
        with evaluating(network):
            assert not network.training
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert network.training


def test_pixels_of_numbers_from_minus_one_to_one():
    # -0.6 is a fifth of the way: 51 of 255; what lies outside of the range is cut off; C, H, W becomes H, W, C
    images = torch.tensor([[-2.0, -1.0], [-0.6, 1.0], [0.0, 3.0]]).view(1, 3, 1, 2)
    assert as_pixels(images).tolist() == [[[[0, 51, 128], [0, 255, 255]]]]
