"""The loss curve of a finished run."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from finetune.run.loss_curve import loss_curve

HISTORY = [
    {"step": 0, "validation/loss": 2.0, "validation/loss_ema": 2.0},
    *({"step": step, "train/loss": 1.0 / step, "train/loss_smoothed": 2.0 / step} for step in range(1, 28)),
    {"step": 28, "train/loss": 0.5, "train/loss_smoothed": 0.4, "train/epoch_loss": 0.7, "validation/loss": 1.0},
]


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """The loss curve of HISTORY, of a run in the folder `digits` with 14 updates an epoch, as matplotlib's figure."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    loss_curve(HISTORY, tmp_path / "digits" / "loss_curve.png", 14)
    with Image.open(tmp_path / "digits" / "loss_curve.png") as png:
        assert png.size == (1080, 600)  # 9 x 5 inches at 120 dots an inch
    return drawn[0]


def test_loss_curve_names_the_run_and_its_axes(figure):
    axes = figure.axes[0]
    assert axes.get_title() == "Loss of digits"
    assert axes.get_xlabel() == "update step"
    assert axes.get_ylabel() == "loss (mean squared error)"


def test_loss_curve_has_an_axis_of_epochs(figure):
    axes = figure.axes[0]
    (epochs,) = axes.child_axes
    assert epochs.get_xlabel() == "epoch"
    assert epochs.get_xlim() == pytest.approx([step / 14 for step in axes.get_xlim()])


def test_loss_curve_shows_every_point_and_marks_those_of_validation(figure):
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert {label: line.get_marker() for label, line in lines.items()} == {
        "each update": "None",
        "smoothed": "None",
        "average of each epoch": "o",
        "validation": "s",
        "validation, averaged weights": "D",
    }
    assert lines["validation"].get_xydata().tolist() == [[0, 2.0], [28, 1.0]]
    assert lines["each update"].get_xydata().tolist() == [[step, 1 / step] for step in range(1, 28)] + [[28, 0.5]]
