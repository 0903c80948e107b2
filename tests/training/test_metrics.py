"""What updates and epochs add up to, by numbers worked out by hand."""

from dataclasses import asdict

import numpy as np
import pytest
from pydantic import TypeAdapter

from finetune.training import metrics
from finetune.training.metrics import EpochLoss, Meters, Stopwatch, loss_by_timestep
from finetune.training.window import WindowResult


def test_epoch_loss_is_over_images_and_not_over_updates():
    epoch = EpochLoss()
    epoch.add(np.array([1.0, 1.0, 1.0]))
    epoch.add(np.array([5.0]))
    assert epoch.close() == 2.0  # (3 x 1 + 5) / 4, where the mean over updates would be 3
    epoch.add(np.array([7.0]))
    assert epoch.close() == 7.0


def test_loss_by_timestep_is_the_mean_of_each_quarter():
    ranges = loss_by_timestep(np.array([1.0, 3.0, 8.0]), np.array([0, 249, 999]), 1000)
    assert ranges == {"000-249": 2.0, "750-999": 8.0}


def test_scalars_of_an_update():
    meters = Meters()
    result = WindowResult(np.array([1.0, 2.0]), 3.0, 4.0, False, 1.0)
    scalars = meters.add_window(result, np.array([10, 900]), 1000)
    assert scalars == {
        "train/loss": 1.5,
        "train/loss_smoothed": 1.5,  # nothing to compare with yet
        "train/grad_norm": 3.0,
        "train/loss_by_timestep/000-249": 1.0,
        "train/loss_by_timestep/750-999": 2.0,
    }
    # taken in, and silent until it is known well enough: |G|^2 = (2 x 9 - 1 x 16) / (2 - 1) = 2
    assert (meters.noise_scale.updates, meters.noise_scale.squared_gradient) == (1, 2.0)


def test_a_norm_that_is_not_finite_stays_out_of_the_noise_scale():
    meters = Meters()
    overflow = WindowResult(np.array([1.0, 2.0]), np.inf, np.inf, False, 1.0)
    scalars = meters.add_window(overflow, np.array([10, 900]), 1000)
    assert "train/gradient_noise_scale" not in scalars
    assert meters.noise_scale.updates == 0


def test_meters_come_back_from_their_state():
    meters = Meters()
    meters.add_window(WindowResult(np.array([1.0, 2.0]), 3.0, 4.0, False, 1.0), np.array([1, 9]), 10)
    assert TypeAdapter(Meters).validate_python(asdict(meters)) == meters
    assert meters != Meters()


def test_a_stopwatch_books_each_phase_and_leaves_out_what_is_skipped(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    stopwatch.tick("data")  # 0 to 1
    stopwatch.tick("compute")  # 1 to 3
    stopwatch.skip()  # 3 to 10: an evaluation
    stopwatch.tick("data")  # 10 to 14
    assert stopwatch.lap() == {"data": pytest.approx(5.0), "compute": pytest.approx(2.0)}
    stopwatch.tick("data")  # 14 to 20
    assert stopwatch.lap() == {"data": 6.0}
