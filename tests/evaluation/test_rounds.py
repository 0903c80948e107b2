"""How an evaluation is divided over processes: every draw once, in chunks that do not depend on the processes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.evaluation.rounds import CHUNK, as_pixels, evaluating, rounds


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 8, 20, 64])
def test_every_draw_is_made_once_in_equally_many_rounds_of_each_process(count, processes):
    shares = [
        list(rounds(count, SimpleNamespace(process_index=index, num_processes=processes))) for index in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    chunks = [chunk for share in shares for chunk in share if chunk is not None]
    assert sorted(draw for chunk in chunks for draw in chunk) == list(range(count))
    # the shapes do not depend on the number of processes, so neither do the last bits
    assert sorted(map(len, chunks)) == sorted(min(CHUNK, count - start) for start in range(0, count, CHUNK))


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
