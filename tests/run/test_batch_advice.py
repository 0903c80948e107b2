"""What a run says of its batch size: when it says something, and overrides that can be followed."""

import shlex

import pytest

from finetune.config.load import load_config
from finetune.config.schema import Config
from finetune.core.batch import BatchLayout, resolve_layout
from finetune.run.batch_advice import batch_advice
from finetune.training.noise_scale import GradientNoiseScale
from harness.compare import history
from harness.configs import tiny_config, write_config, write_pictures
from harness.processes import finish, run_two


def known(value: float, low: float, high: float) -> GradientNoiseScale:
    """A noise scale after many updates with this value and roughly this interval."""
    deviation = (high - low) / 4
    return GradientNoiseScale(1.0, value, [100 * deviation**2, 0.0, 0.0], squared_weights=1 / 101, updates=101)


@pytest.mark.parametrize(("low", "high", "said"), [(10, 39, True), (9, 41, False), (0, 5, False)])
def test_nothing_is_said_until_it_is_known_to_a_factor_of_two(low, high, said):
    scale = known((low + high) / 2, low, high)
    assert scale.interval == pytest.approx((low, high), abs=0.2)
    assert (scale.value is not None) == said
    config = Config.model_validate(tiny_config("pictures", "run"))
    assert (batch_advice(scale, config, BatchLayout(1, 2, 1), 10000) is not None) == said


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
    text = batch_advice(known(value, value * 0.88, value * 1.12), config, layout, 10_000)
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
    text = batch_advice(known(9, 8, 10), config, BatchLayout(16, 4, 1), 10_000)
    assert overrides_in(text) == [
        "output_dir=run-batch-9",
        "training.global_batch_size=9",
        "training.micro_batch_size=9",
    ]
    text = batch_advice(known(12, 8, 18), config, BatchLayout(16, 4, 1), 10_000)
    assert overrides_in(text) == ["output_dir=run-batch-16", "training.global_batch_size=16"]


def test_a_batch_within_the_interval_is_left_alone():
    config = Config.model_validate(tiny_config("pictures", "run"))
    assert batch_advice(known(40, 25, 55), config, BatchLayout(8, 4, 1), 10_000) == (
        "Gradient noise scale over about the last 101 updates: 40 images (95 % interval 25 to 55). Batches larger than "
        "that bring little. This run uses 32, which is about right."
    )


def test_no_batch_of_more_images_than_there_are():
    config = Config.model_validate(tiny_config("pictures", "run"))  # micro-batches of 4 and 2 steps
    text = batch_advice(known(5000, 4000, 6000), config, BatchLayout(4, 2, 1), 100)
    assert overrides_in(text) == ["output_dir=run-batch-100", "training.gradient_accumulation_steps=25"]


def test_a_run_that_resumes_a_certain_checkpoint():
    config = Config.model_validate(tiny_config("p", "run", checkpoint={"resume": "run/checkpoint-3"}))
    assert "checkpoint.resume=auto" in overrides_in(batch_advice(known(9, 8, 10), config, BatchLayout(4, 8, 1), 100))


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
