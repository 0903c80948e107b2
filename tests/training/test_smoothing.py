"""train/loss_smoothed: right at every update, and a fraction of the raw curve's noise."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from finetune.training.metrics import Meters
from finetune.training.smoothing import SmoothedLoss, Trend
from harness.simulated_losses import FALLS, UPDATES, simulate
from harness.trend_estimators import DebiasedMean


def curves(fall: str, images: int, smoothed: SmoothedLoss, seed: int = 0, **options: str) -> np.ndarray:
    """Relative deviations of the raw mean and of the smoothed loss from the true level, shape (2, UPDATES)."""
    points = []
    for losses, timesteps, level in simulate(fall, images, seed, **options):
        points.append((losses.mean() / level - 1, smoothed.add(losses, timesteps, 1000) / level - 1))
    return np.array(points).T


@pytest.mark.parametrize("noise_levels", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("images", [8, 64, 1024])
@pytest.mark.parametrize("fall", FALLS)
def test_at_every_update_it_is_within_the_noise_of_the_raw_curve(fall, images, noise_levels):
    """In standard deviations of a raw window, of which the fit's own is 0.40 (see below), and 1 at the first update.

    Of 300 updates some fifty are independent, and no one of them should be further off than 3.3, which normal noise is
    once in a thousand.
    """
    raw, smoothed = curves(fall, images, SmoothedLoss(), noise_levels=noise_levels)
    noise = raw.std()
    assert np.abs(smoothed).max() < 3.3 * noise
    assert np.sqrt((smoothed**2).mean()) < 0.7 * noise


@pytest.mark.parametrize(
    ("fall", "off"), [("exponential to a floor", 4), ("step to a half", 10), ("power law", 4), ("from scratch", 10)]
)
def test_a_plain_mean_lags_behind_a_falling_loss(fall, off):
    raw, smoothed = curves(fall, 64, SmoothedLoss(DebiasedMean()))
    assert np.abs(smoothed).max() > off * raw.std()


def weights(theta: float) -> np.ndarray:
    """The newest fitted value of a linear fit whose points weigh theta^j, as a mean over the points j updates ago:
    (1 - theta) theta^j ((1 + theta) - (1 - theta) j). They sum to 1, and their first moment to 0: no lag."""
    ago = np.arange(300)
    return (1 - theta) * theta**ago * ((1 + theta) - (1 - theta) * ago)


def test_it_is_a_linear_fit_over_about_eight_updates():
    """One point that is off by 1e-6, in a series that is long and equal otherwise, moves the level by its weight."""
    trend, levels = Trend(), []
    for step in range(700):
        levels.append(trend.add(1 + 1e-6 * (step == 400), 0.01))
    assert (np.array(levels)[400:] - 1) * 1e6 == pytest.approx(weights(0.875), abs=1e-4)
    assert weights(0.875).sum() == pytest.approx(1)
    assert np.sqrt((weights(0.875) ** 2).sum()) == pytest.approx(0.40, abs=0.005)


@pytest.mark.parametrize("images", [4, 64, 1024])
def test_it_removes_three_quarters_of_the_step_to_step_deviation_at_fixed_weights(images):
    """Independent windows of deviation s differ by sqrt(2) s from step to step; the fit by s sqrt(sum (w_j - w_j-1)^2),
    which is 0.17 of it. What comes on top: an outlier that is taken for a change, once in some hundred updates."""
    differences = np.diff(weights(0.875), prepend=0)
    assert np.sqrt((differences**2).sum() / 2) == pytest.approx(0.17, abs=0.005)
    raw, smoothed = curves("none", images, SmoothedLoss())[:, UPDATES // 3 :]
    assert 0.1 < np.diff(smoothed).std() / np.diff(raw).std() < 0.25


def test_an_exponential_fall_is_followed_without_lag():
    trend = Trend()
    for step in range(100):
        true = 3 * np.exp(-0.05 * step)
        # noise of 1 %; at the second point the prior, a slope of 0 +- 0.5, still counts 1e-4 / 0.25 of the first 5 %
        assert trend.add(true, 1e-4) == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("factor", [0.5, 2.0, 1e-6, 1e6])
def test_a_jump_far_beyond_the_noise_is_followed_at_once(factor):
    """Points are forgotten until the jump is 3 standard errors: d^2 = 9 (a + R), with d = ln(factor), so that the gain
    a / (a + R) is 1 - 9 R / d^2, and 9 R / d^2 of the jump is left: with R = 1e-4 less than 0.002 of it."""
    trend = Trend()
    for _ in range(100):
        trend.add(1.0, 1e-4)
    assert trend.add(factor, 1e-4) == pytest.approx(factor, abs=0.002 * abs(factor - 1))
    for _ in range(3):  # the slope that the jump suggests is forgotten as quickly
        level = trend.add(factor, 1e-4)
    assert level == pytest.approx(factor, rel=0.05)


def test_an_outlier_within_the_noise_moves_it_by_its_weight_only():
    trend = Trend()
    for _ in range(100):
        trend.add(1.0, 1e-2)
    # 25 % is 2.5 standard deviations of 10 %; the newest point weighs 1 - 0.875^2 = 0.234
    assert trend.add(1.25, 1e-2) == pytest.approx(1 + 0.234 * 0.25, abs=1e-3)


RAW = [1.152, 0.544, 0.352, 0.352, 0.330, 0.331, 0.342, 0.285, 0.275]  # a run of nine updates from scratch


@pytest.mark.parametrize("seed", range(5))
def test_a_short_run_from_scratch(seed):
    """Windows of 64 images have noise of 0.4 / sqrt(64) = 5 %: the curve stays between its neighbours, give or take."""
    rng, smoothed, values = np.random.default_rng(seed), SmoothedLoss(), []
    for mean in RAW:
        losses = rng.gamma(6.25, size=64)  # relative standard deviation 6.25^-0.5 = 0.4
        values.append(smoothed.add(mean * losses / losses.mean(), rng.permutation(64) * 15, 1000))
    assert values[0] == pytest.approx(RAW[0])
    for step, value in enumerate(values):
        near = RAW[max(step - 1, 0) : step + 2]
        assert 0.95 * min(near) < value < 1.05 * max(near)
    assert values[-1] == pytest.approx(np.mean(RAW[-3:]), rel=0.1)  # where it was 0.671


@pytest.mark.parametrize("num_train_timesteps", [1000, 75, 10])
def test_it_does_not_move_with_the_draw_of_timesteps(num_train_timesteps):
    """A loss that is a function of the timestep alone: once each range was seen, any draw gives the same level, but for
    how often each was drawn so far."""
    level = np.linspace(10, 1, 50)
    smoothed, rng = SmoothedLoss(), np.random.default_rng(0)
    everything = np.arange(num_train_timesteps)
    cost = level[everything * 50 // num_train_timesteps]
    for _ in range(20):
        smoothed.add(cost, everything, num_train_timesteps)
    draws = rng.integers(0, num_train_timesteps, (50, 4))
    values = [smoothed.add(cost[draw], draw, num_train_timesteps) for draw in draws]
    raw = [cost[draw].mean() for draw in draws]
    assert np.std(raw) > 1
    # of some 20 x T images the draws are 200; with T = 10 they weigh half, and their mean is off by 2.9 / sqrt(200)
    assert values == pytest.approx(
        [cost.mean()] * 50, abs=3 * 2.9 / np.sqrt(200) * 200 / (200 + 20 * num_train_timesteps)
    )


def test_baselines_that_were_never_drawn_are_interpolated():
    smoothed = SmoothedLoss()
    smoothed.add(np.array([1.0, 3.0]), np.array([0, 980]), 1000)  # ranges 0 and 49; the mean is 2
    # in between the expected loss is on the line from 1 to 3: a loss of 2 at the middle is no news
    assert smoothed.add(np.array([1.0, 3.0, 2.0]), np.array([0, 980, 490]), 1000) == pytest.approx(2.0, rel=0.01)
    assert smoothed.add(np.array([1.5]), np.array([245]), 1000) == pytest.approx(2.0, rel=0.01)


def test_baselines_follow_the_last_twenty_images_of_their_noise_level():
    """The costs of the noise levels change while their mean stays. After k images the old weigh 0.95^k."""
    smoothed, timesteps, cost = SmoothedLoss(), np.arange(0, 1000, 20), np.linspace(1, 3, 50)
    for _ in range(200):
        smoothed.add(cost, timesteps, 1000)
    assert smoothed.baselines == pytest.approx(cost / 2)
    for _ in range(20):
        smoothed.add(cost[::-1], timesteps, 1000)
    assert smoothed.baselines == pytest.approx((0.95**20 * cost + (1 - 0.95**20) * cost[::-1]) / 2)


def test_images_are_compared_within_their_group():
    """Images of group 1 cost twice as much. Which are in a window does not matter once both groups are known."""
    rng = np.random.default_rng(0)
    apart, mixed, deviations = SmoothedLoss(), SmoothedLoss(), []
    for step in range(200):
        groups = (rng.random(16) < 0.25).astype(np.int64)
        timesteps = rng.integers(0, 1000, 16)
        losses = 1.0 + groups
        values = apart.add(losses, timesteps, 1000, groups), mixed.add(losses, timesteps, 1000)
        if step >= 100:
            deviations.append(values)
    # Of 3200 images 1.25 on average: the share of group 1 is known to sqrt(0.25 x 0.75 / 1600) = 0.011
    assert np.array(deviations)[:, 0] == pytest.approx(1.25, abs=4 * 0.011)
    assert np.std(deviations, axis=0)[0] < 0.2 * np.std(deviations, axis=0)[1]


def test_a_group_that_appears_later_starts_from_the_others():
    smoothed = SmoothedLoss()
    timesteps = np.arange(0, 1000, 20)
    cost = np.linspace(10, 1, 50)
    for _ in range(10):
        smoothed.add(cost, timesteps, 1000)
    groups = np.array([0, 2])
    assert smoothed.add(cost[[5, 40]], timesteps[[5, 40]], 1000, groups) == pytest.approx(5.5, rel=0.02)
    assert len(smoothed.baselines) == 3 * 50


@given(st.integers(-60, 60), st.integers(0, 9))
def test_it_has_the_unit_of_the_loss(exponent, seed):
    """A power of two scales floats without rounding: the curve scales to the last bit."""
    rng, one, other = np.random.default_rng(seed), SmoothedLoss(), SmoothedLoss()
    for _ in range(6):
        losses, timesteps = rng.gamma(4, size=5), rng.integers(0, 1000, 5)
        value = one.add(losses, timesteps, 1000)
        assert other.add(losses * 2.0**exponent, timesteps, 1000) == value * 2.0**exponent


@given(st.lists(st.lists(st.floats(0, 1e12), min_size=1, max_size=5), min_size=1, max_size=20))
def test_any_finite_losses_give_a_finite_level(windows):
    smoothed = SmoothedLoss()
    for losses in windows:
        timesteps = np.arange(len(losses)) * 37
        level = smoothed.add(np.array(losses), timesteps, 100)
        assert np.isfinite(level)
        assert level >= 0
    assert np.isfinite(smoothed.baselines).all()


def test_a_resumed_curve_is_the_same_to_the_last_bit():
    """Through the JSON of the run state, at every update; the state stays small."""
    whole, resumed = Meters(), Meters()
    for losses, timesteps, _ in list(simulate("from scratch", 16, 0))[:40]:
        groups = (timesteps % 3 == 0).astype(np.int64)
        resumed = TypeAdapter(Meters).validate_python(json.loads(json.dumps(asdict(resumed))))
        expected = whole.smoothed.add(losses, timesteps, 1000, groups)
        assert resumed.smoothed.add(losses, timesteps, 1000, groups) == expected
    assert resumed == whole
    assert len(json.dumps(asdict(whole.smoothed))) < 4000
