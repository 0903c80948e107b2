"""The gradient noise scale: its interval holds what it promises, and its advice can be followed."""

import json
import math
import shlex
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.core.batch import BatchLayout, resolve_layout
from finetune.training.metrics import Meters
from finetune.training.noise_scale import GradientNoiseScale
from harness.compare import history
from harness.configs import tiny_config, write_config, write_pictures
from harness.processes import finish, run_two


def known(value: float, low: float, high: float) -> GradientNoiseScale:
    """A noise scale after many updates with this value and roughly this interval."""
    deviation = (high - low) / 4
    return GradientNoiseScale(1.0, value, [100 * deviation**2, 0.0, 0.0], squared_weights=1 / 101, updates=101)


def test_both_means_and_their_scatter_by_hand():
    scale = GradientNoiseScale()
    # micro-batches of 1 in windows of 2: |G|^2 = (2 x 9 - 1 x 16) / (2 - 1) = 2, S = (16 - 9) / (1 - 1/2) = 14
    scale.add(16.0, 9.0, 1, 2)
    assert (scale.squared_gradient, scale.noise) == (2.0, 14.0)
    # |G|^2 = 2 x 7 - 10 = 4, S = (10 - 7) x 2 = 6; the second update weighs 4 / 5
    scale.add(10.0, 7.0, 1, 2)
    assert (scale.squared_gradient, scale.noise) == pytest.approx((0.2 * 2 + 0.8 * 4, 0.2 * 14 + 0.8 * 6))
    # the weighted variance of two values is 0.2 x 0.8 x their difference squared
    assert scale.scatter == pytest.approx([0.16 * 8 * 8, 0.16 * -8 * 2, 0.16 * 2 * 2])
    assert scale.squared_weights == pytest.approx(0.2**2 + 0.8**2)


def test_old_updates_are_forgotten():
    """Of n updates the k-th weighs 4 k (k+1) (k+2) / (n (n+1) (n+2) (n+3)), and the first half together
    (n/2 .. n/2+3) / (n .. n+3), about 1/16."""
    scale = GradientNoiseScale()
    for _ in range(100):
        scale.add(16.0, 9.0, 1, 2)  # S = 14, as above
    for _ in range(100):
        scale.add(10.0, 7.0, 1, 2)  # S = 6
    assert scale.noise == pytest.approx(6 + 8 * math.prod(range(100, 104)) / math.prod(range(200, 204)))
    k, n = np.arange(1, 201), 200
    weights = 4 * k * (k + 1) * (k + 2) / (n * (n + 1) * (n + 2) * (n + 3))
    assert scale.squared_weights == pytest.approx((weights**2).sum())


def test_the_interval_by_hand():
    """S = 30 with a standard error of 3 and |G|^2 = 2 known exactly, from 101 updates of equal weight: (30 +- 3 t) / 2
    with Student's t of 100 degrees of freedom, 1.984."""
    scale = GradientNoiseScale(2.0, 30.0, [9.0 * 100, 0.0, 0.0], squared_weights=1 / 101, updates=101)
    assert scale.interval == pytest.approx((15 - 1.5 * 1.984, 15 + 1.5 * 1.984), rel=1e-4)
    assert scale.value == 15.0


@given(st.floats(1, 100), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(-0.9, 0.9), st.integers(40, 500))
def test_at_its_ends_the_difference_is_t_standard_errors(noise, noise_error, gradient_error, correlation, updates):
    """|S - r |G|^2| = t se(S - r |G|^2), with |G|^2 = 1."""
    freedom = updates - 1
    noise_error *= noise
    covariance = [noise_error**2, correlation * noise_error * gradient_error, gradient_error**2]
    scale = GradientNoiseScale(1.0, noise, [freedom * value for value in covariance], 1 / updates, updates)
    t = 1.96 + 2.372 / freedom + 2.822 / freedom**2  # of Student's distribution
    if t * gradient_error >= 1:  # |G|^2 may as well be zero, and the noise scale anything
        assert scale.interval is None
        return
    low, high = scale.interval
    assert low <= noise <= high
    for end in {low, high} - {0.0}:
        squared_error = covariance[0] - 2 * end * covariance[1] + end**2 * covariance[2]
        assert abs(noise - end) == pytest.approx(t * math.sqrt(squared_error), rel=1e-6)


def gradients(runs: int, updates: int, dimensions: int, noise_scale: float, micro: int, layout: tuple[int, int]):
    """Squared norms of the gradient of a micro-batch and of a window, two arrays (runs, updates).

    |G|^2 = 1 and the noise has the same variance in each dimension, noise_scale in total; `layout` is accumulation
    steps x processes.
    """
    steps, processes = layout
    rng = np.random.default_rng(0)
    deviation = math.sqrt(noise_scale / dimensions / micro)
    means = deviation * rng.standard_normal((runs, updates, steps * processes, dimensions), np.float32)
    means[..., 0] += 1
    small = np.square(means[:, :, :processes]).sum(3).mean(2)  # the processes' first micro-batches, as in Window
    return small, np.square(means.mean(2)).sum(2)


@pytest.mark.parametrize(
    ("updates", "dimensions", "noise_scale", "micro", "layout"),
    [
        (40, 20, 45, 8, (8, 1)),
        (60, 50, 15, 16, (4, 1)),
        (60, 50, 5, 4, (2, 2)),
        (60, 50, 200, 8, (8, 1)),
        (300, 20, 45, 8, (4, 1)),
    ],
)
def test_the_interval_covers_the_truth_in_95_of_100_runs(updates, dimensions, noise_scale, micro, layout):
    """Of 500 runs 475 are expected, with a binomial standard deviation of sqrt(500 x 0.95 x 0.05) = 4.9. Four of them
    either way leave [456, 494]; standard errors that are a quarter too small or too large do not (86 % and 98.6 %)."""
    runs, covered = 500, 0
    small, big = gradients(runs, updates, dimensions, noise_scale, micro, layout)
    batch = micro * math.prod(layout)
    for norms in zip(small.tolist(), big.tolist(), strict=True):
        scale = GradientNoiseScale()
        for of_micro, of_window in zip(*norms, strict=True):
            scale.add(of_micro, of_window, micro, batch)
        low, high = scale.interval or (0, math.inf)
        covered += low <= noise_scale <= high
    assert 456 <= covered <= 493


def test_gradients_without_noise():
    scale = GradientNoiseScale()
    for _ in range(40):
        scale.add(4.0, 4.0, 8, 64)
    assert (scale.squared_gradient, scale.interval, scale.value) == (4.0, (0.0, 0.0), 0.0)


def test_nothing_is_said_of_a_few_updates():
    scale = GradientNoiseScale()
    for _ in range(39):
        scale.add(4.0, 4.0, 8, 64)
        assert scale.interval is scale.value is None


@pytest.mark.parametrize(("low", "high", "said"), [(10, 39, True), (9, 41, False), (0, 5, False)])
def test_nothing_is_said_until_it_is_known_to_a_factor_of_two(low, high, said):
    scale = known((low + high) / 2, low, high)
    assert scale.interval == pytest.approx((low, high), abs=0.2)
    assert (scale.value is not None) == said
    config = Config.model_validate(tiny_config("pictures", "run"))
    assert (scale.advice(config, BatchLayout(1, 2, 1), 10000) is not None) == said


def test_meters_log_it_once_it_means_something():
    from finetune.training.window import WindowResult

    meters, rng = Meters(), np.random.default_rng(0)
    logged = []
    for _ in range(60):  # windows of 4 micro-batches of 8; |G|^2 = 1 and a noise of 30 in 50 dimensions
        means = rng.standard_normal((4, 50)) * math.sqrt(30 / 50 / 8)
        means[:, 0] += 1
        norms = np.linalg.norm(means.mean(0)), np.linalg.norm(means[0])
        result = WindowResult(np.ones(32), float(norms[0]), float(norms[1]), False, 8.0)
        scalars = meters.add_window(result, np.arange(32) * 30, 1000)
        logged.append(scalars.get("train/gradient_noise_scale"))
    assert logged[:39] == [None] * 39
    assert logged[-1] == meters.noise_scale.value == pytest.approx(30, rel=0.5)
    assert TypeAdapter(Meters).validate_python(json.loads(json.dumps(asdict(meters)))) == meters


def batch_keys(style: str, processes: int = 1) -> dict:
    """What a config may give of a batch of 16 images a process in micro-batches of 4."""
    sizes = {"global_batch_size": 16 * processes, "micro_batch_size": 4, "gradient_accumulation_steps": 4}
    if style == "auto":
        return {"global_batch_size": 16 * processes, "micro_batch_size": "auto"}
    return {name: size for name, size in sizes.items() if name.split("_")[0] in style}


STYLES = ["global and micro", "micro and gradient", "global and gradient", "global, micro and gradient", "auto"]


def batch_config(keys: dict, pictures, output_dir, **changes) -> dict:
    config = tiny_config(pictures, output_dir, **changes)
    config["training"] = keys | {"max_train_steps": 3}
    return config


def overrides_in(text: str) -> list[str]:
    """The overrides that an advice ends with, as a shell would read them."""
    before, _, typed = text.partition("add to the command:\n")
    assert before, text
    return shlex.split(typed.splitlines()[0])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("value", "batches"),
    [  # the batch on 1, 2 and 3 processes, each with micro-batches of 4; the interval is 12 % to both sides
        (0.4, (1, 2, 3)),  # an image each
        (3, (3, 4, 3)),  # micro-batches of 3, 2 and 1: 1.5 images on each of two processes round to 2
        (9, (8, 8, 9)),  # two micro-batches of 4 are within 12 % of 9; three are not, so it is three of 3
        (24, (24, 24, 24)),  # 6, 2 x 3 and 3 x 2 micro-batches of 4
        (251, (252, 248, 252)),  # 63, 2 x 31 and 3 x 21 micro-batches of 4
    ],
)
def test_the_same_command_takes_the_advice(tmp_path, style, value, batches, processes):
    """With its overrides the config is valid, divides on as many processes, and gives the batch that is named."""
    keys = batch_keys(style, processes)
    file = write_config(tmp_path / "run.yaml", batch_config(keys, tmp_path, tmp_path / "my run: 1"))
    config = load_config(file)
    layout = BatchLayout(4, 4, processes)
    expected = batches[processes - 1]
    text = known(value, value * 0.88, value * 1.12).advice(config, layout, 10_000)
    tried = load_config(file, overrides_in(text))
    training = tried.training
    sizes = training.global_batch_size, training.micro_batch_size, training.gradient_accumulation_steps
    assert resolve_layout(*sizes, processes).global_batch_size == expected
    assert f"to try {expected}," in text
    assert tried.output_dir == f"{tmp_path}/my run: 1-batch-{expected}"
    # nothing else changes, and no micro-batch is larger than those that fitted
    assert tried.model_dump(exclude={"output_dir", "training"}) == config.model_dump(exclude={"output_dir", "training"})
    if style != "auto":
        assert resolve_layout(*sizes, processes).micro_batch_size <= 4


def test_a_micro_batch_that_is_too_large_is_made_smaller():
    """9 images where micro-batches are of 16: 16 is outside the interval, and one micro-batch of 9 is it."""
    config = Config.model_validate(batch_config({"global_batch_size": 64, "micro_batch_size": 16}, "pictures", "run"))
    text = known(9, 8, 10).advice(config, BatchLayout(16, 4, 1), 10_000)
    assert overrides_in(text) == [
        "output_dir=run-batch-9",
        "training.global_batch_size=9",
        "training.micro_batch_size=9",
    ]
    text = known(12, 8, 18).advice(config, BatchLayout(16, 4, 1), 10_000)
    assert overrides_in(text) == ["output_dir=run-batch-16", "training.global_batch_size=16"]


def test_a_batch_within_the_interval_is_left_alone():
    config = Config.model_validate(tiny_config("pictures", "run"))
    assert known(40, 25, 55).advice(config, BatchLayout(8, 4, 1), 10_000) == (
        "Gradient noise scale over about the last 101 updates: 40 images (95 % interval 25 to 55). Batches larger than "
        "that bring little. This run uses 32, which is about right."
    )


def test_no_batch_of_more_images_than_there_are():
    config = Config.model_validate(tiny_config("pictures", "run"))  # micro-batches of 4 and 2 steps
    text = known(5000, 4000, 6000).advice(config, BatchLayout(4, 2, 1), 100)
    assert overrides_in(text) == ["output_dir=run-batch-100", "training.gradient_accumulation_steps=25"]


def test_a_run_that_resumes_a_certain_checkpoint():
    config = Config.model_validate(tiny_config("p", "run", checkpoint={"resume": "run/checkpoint-3"}))
    assert "checkpoint.resume=auto" in overrides_in(known(9, 8, 10).advice(config, BatchLayout(4, 8, 1), 100))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 40)


def know_it(process: int = 0) -> None:
    """The run in this process finds a noise scale of 8 images, known well."""
    GradientNoiseScale.interval = property(lambda scale: (7.0, 9.0))
    GradientNoiseScale.value = property(lambda scale: 8.0)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_the_printed_override_added_to_the_command_starts_another_run(style, pictures, tmp_path):
    file = write_config(tmp_path / "run.yaml", batch_config(batch_keys(style), pictures, tmp_path / "run"))
    outcome = finish("--config", file, folder=tmp_path / "first", before=know_it)
    overrides = overrides_in(outcome.stdout)
    assert overrides[0] == f"output_dir={tmp_path}/run-batch-8"
    checked = finish("--config", file, *overrides, "--check", folder=tmp_path / "check")
    assert "  batch          8 = " in checked.stdout
    if style == "global and micro":
        finish("--config", file, *overrides, folder=tmp_path / "second")
        assert len(history(tmp_path / "run-batch-8")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("style", ["global and micro", "micro and gradient", "auto"])
def test_two_processes_take_the_printed_override(style, pictures, tmp_path):
    file = write_config(tmp_path / "run.yaml", batch_config(batch_keys(style, 2), pictures, tmp_path / "run"))
    main, _ = run_two("--config", file, folder=tmp_path / "first", before=know_it)
    overrides = overrides_in(main.stdout)
    outcomes = run_two("--config", file, *overrides, "--check", folder=tmp_path / "check")
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    assert "  batch          8 = " in outcomes[0].stdout


@pytest.mark.slow
def test_a_run_of_three_updates_says_nothing(pictures, tmp_path):
    config = batch_config(batch_keys("micro and gradient"), pictures, tmp_path / "run")
    outcome = finish("--config", write_config(tmp_path / "run.yaml", config), folder=tmp_path)
    assert "noise scale" not in outcome.stdout
    assert all("train/gradient_noise_scale" not in line for line in history(tmp_path / "run"))
