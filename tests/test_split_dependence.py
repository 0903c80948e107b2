"""Networks whose runs depend on the split say so at the start, in one line."""

import pytest
from torch import nn

from finetune import model
from splits import relative_difference
from tiny import UNET, run_here, tiny_config, weights, write_pictures

NOTE = "Note: this run depends on how its batches are split"
STEPS = 2


def notes(folder, capfd, micro_batch_size=4, check=True, **unet):
    """The lines of a start that are about it."""
    folder.mkdir(exist_ok=True)
    config = tiny_config(
        write_pictures(folder / "pictures", 8),
        folder / str(micro_batch_size),
        model__unet={**UNET, **unet},
        training={"global_batch_size": 4, "micro_batch_size": micro_batch_size, "num_epochs": 1},
    )
    assert run_here(config, folder / "config.yaml", check=check) == 0
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith(NOTE)]


@pytest.fixture
def batch_normalised(monkeypatch):
    """The network's own layers, but the last normalisation is one over the batch."""
    build = model._build_unet

    def built(*arguments):
        unet = build(*arguments)
        unet.conv_norm_out = nn.BatchNorm2d(8)
        return unet

    monkeypatch.setattr(model, "_build_unet", built)


def test_an_ordinary_network_says_nothing(tmp_path, capfd):
    assert notes(tmp_path, capfd) == []


def test_dropout_is_said_with_the_first_of_its_layers(tmp_path, capfd):
    # one in each of the resnets: 2 x 1 on the way down, 2 in the middle, 2 x 2 on the way up
    (line,) = notes(tmp_path, capfd, dropout=0.1)
    first = ", ".join(f"{name}.dropout (Dropout)" for name in ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0"))
    assert first in line
    assert line.endswith(" and 5 more")


def test_batch_normalisation_is_said(tmp_path, capfd, batch_normalised):
    (line,) = notes(tmp_path, capfd)
    assert line.endswith(": conv_norm_out (BatchNorm2d)")


@pytest.mark.parametrize("network", ["ordinary", "batch normalised"])
def test_and_it_is_true(tmp_path, capfd, request, network):
    if network == "batch normalised":
        request.getfixturevalue("batch_normalised")
    said = [bool(notes(tmp_path, capfd, micro, check=False)) for micro in (4, 2)]
    apart = relative_difference(weights(tmp_path / "4", STEPS), weights(tmp_path / "2", STEPS))
    assert said == [network != "ordinary"] * 2
    assert (apart > 1e-4) == (network != "ordinary")
