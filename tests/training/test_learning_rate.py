"""The learning rate logged by real runs is what the config says, in any batch layout and after a resume.

Each schedule is a closed-form function of the number of updates that were applied (tests/training/test_optim.py checks
all of them), so a run can only get that number wrong. One schedule that changes at every update shows it: linear decay
after a warm-up.
"""

import pytest

from harness.compare import history
from harness.configs import tiny_config, write_config, write_pictures
from harness.faults import skip_the_export, stop_after_updates
from harness.processes import finish, run, run_two

IMAGES, BATCH, EPOCHS, RATE, WARMUP = 19, 8, 2, 1e-3, 3
STEPS = 6  # an epoch has windows of 8, 8 and 3 images
# updates 0 to 5: a warm-up of three, then down to 0 at update 6
EXPECTED = [RATE * factor for factor in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), IMAGES)


def config_file(pictures, folder, steps):
    config = tiny_config(
        pictures,
        folder / "run",
        training={"global_batch_size": BATCH, "gradient_accumulation_steps": steps, "num_epochs": EPOCHS},
        optimizer__learning_rate=RATE,
        lr_scheduler={"name": "linear", "warmup_steps": WARMUP},
        ema__enabled=False,
    )
    return write_config(folder / "config.yaml", config)


def logged(folder):
    lines = history(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["train/learning_rate"] for line in lines]


@pytest.mark.parametrize("steps", [1, 4])
def test_learning_rate_on_one_process(pictures, tmp_path, steps):
    finish("--config", config_file(pictures, tmp_path, steps), folder=tmp_path, before=skip_the_export)
    assert logged(tmp_path) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_learning_rate_on_two_processes(pictures, tmp_path, steps):
    file = config_file(pictures, tmp_path, steps)
    outcomes = run_two("--config", file, folder=tmp_path, before=lambda _: skip_the_export())
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert logged(tmp_path) == pytest.approx(EXPECTED, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 4])  # in the warm-up, at its and an epoch's end, in the last epoch
def test_learning_rate_after_resuming_with_other_accumulation_steps(pictures, tmp_path, stop):
    before = run(
        "--config", config_file(pictures, tmp_path, 2), folder=tmp_path, before=lambda: stop_after_updates(stop)
    )
    assert before.returncode == 143
    finish("--config", config_file(pictures, tmp_path, 4), folder=tmp_path, before=skip_the_export)
    assert logged(tmp_path) == pytest.approx(EXPECTED, rel=1e-12)
