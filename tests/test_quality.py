"""The quality of samples, measured during a run, and the best checkpoint kept by it."""

from functools import partial

import pytest

from finetune.evaluation.quality import Quality
from harness.compare import history, run_state, valid_checkpoints
from harness.configs import EVALUATED_STEPS, evaluated_config, of_kind, write_config, write_pictures
from harness.faults import kill_at
from harness.features import save_resnet
from harness.processes import finish, run, run_two
from harness.shapes import SHAPES, write_shapes

DISTANCES = ("validation/frechet_distance", "validation/kernel_distance")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("quality")
    features = save_resnet(base / "features")
    options = {
        "data__validation_fraction": 0.3,
        "validation": {"quality": {"features": features, "images": 12, "every_steps": 2}},
        "checkpoint": {"every_steps": 2, "keep": 1, "keep_best": True},
        "samples": {"count": 0, "inference_steps": 2},
    }
    config = evaluated_config(write_pictures(base / "pictures", 24), base / "run", **options)
    write_config(base / "config.yaml", config)
    finish("--config", base / "config.yaml", folder=base)
    return base


def measured(output_dir):
    return [{key: line[key] for key in ("step", *DISTANCES)} for line in history(output_dir) if DISTANCES[0] in line]


def test_distances_are_logged_at_their_interval_and_are_in_the_card(base):
    lines = measured(base / "run")
    # 24 pictures, 7 held out: 17 in windows of 8 are 3 updates, twice
    assert [line["step"] for line in lines] == [0, 2, 4, EVALUATED_STEPS]
    card = (base / "run/pipeline/README.md").read_text()
    assert f"{lines[-1]['validation/kernel_distance']:.5f}" in card


@pytest.mark.slow
def test_two_processes_measure_the_same_of_the_same_weights(base, tmp_path):
    layout = ("training.micro_batch_size=2", f"output_dir={tmp_path / 'run'}")
    outcomes = run_two("--config", base / "config.yaml", *layout, folder=tmp_path)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    one, two = measured(base / "run"), measured(tmp_path / "run")
    assert two[0] == one[0]  # step 0: the same weights
    assert two == [pytest.approx(line, rel=1e-3, abs=1e-4) for line in one]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unconditional", "sdxl"])
def test_pictures_of_many_shapes_are_measured_the_same_by_two_processes(tmp_path, kind):
    pictures = write_shapes(tmp_path / "pictures", 24, kind)
    options = of_kind(kind, pictures) | {
        "data__buckets": SHAPES,
        "data__validation_fraction": 0.3,
        "validation": {"quality": {"features": save_resnet(tmp_path / "features"), "images": 12, "every_steps": 2}},
        "samples": {"count": 0, "inference_steps": 2},
    }
    file = write_config(tmp_path / "config.yaml", evaluated_config(pictures, tmp_path / "one", **options))
    finish("--config", file, "training.max_train_steps=2", folder=tmp_path)
    layout = ("training.micro_batch_size=2", "training.max_train_steps=2", f"output_dir={tmp_path / 'two'}")
    outcomes = run_two("--config", file, *layout, folder=tmp_path)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert [line["step"] for line in one] == [0, 2]
    assert two[0] == one[0]  # the same weights
    assert two == [pytest.approx(line, rel=1e-3, abs=1e-4) for line in one]


@pytest.mark.parametrize("best", [2, 4, 6])
def test_the_best_checkpoint_is_kept_beside_the_newest(base, tmp_path, best):
    """Distances that a test chooses: the lowest at one step, and a lower one before any update, which is no step."""

    def before():
        kernel = iter(0.0 if step in (0, best) else 1.0 for step in (0, 2, 4, 6))
        Quality.distances = lambda *_: {"kernel_distance": next(kernel), "frechet_distance": 1.0}

    finish("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", folder=tmp_path, before=before)
    assert valid_checkpoints(tmp_path / "run") == sorted({best, EVALUATED_STEPS})  # keep is 1
    state = run_state(tmp_path / "run", EVALUATED_STEPS)["state"]
    assert (state["best_step"], state["best_distance"]) == (best, 0.0)


@pytest.mark.slow
def test_a_run_killed_while_it_is_measured_resumes_with_the_same_distances(base, tmp_path):
    command = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    killed = run(*command, folder=tmp_path, before=partial(kill_at, Quality, "distances", 3))
    assert killed.returncode == -9
    finish(*command, folder=tmp_path)
    assert measured(tmp_path / "run") == measured(base / "run")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("validation.quality.features=no/where", "validation.quality.features: 'no/where' cannot be loaded"),
        (
            "data.validation_fraction=0",
            "validation.quality: found no held-out images; expected data.validation_",
        ),
        ("validation.quality=null", "checkpoint.keep_best: found true; needs validation.quality"),
        ("data.validation_fraction=0.05", "validation.quality: found 1 held-out image; expected at least 2"),  # of 24
        (
            "validation.quality.images=1",
            "validation.quality.images: found 1; expected at least 2, to estimate a covariance",
        ),
        (
            "validation.quality.image=3",
            "image: unknown key; did you mean validation.quality.images?",
        ),
    ],
)
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["run", "check"])
def test_a_mistake_is_one_line_and_nothing_is_written(base, tmp_path, override, line, check):
    command = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", override, *check)
    outcome = run(*command, folder=tmp_path)
    assert outcome.returncode == 2
    assert line in outcome.error
    assert not (tmp_path / "run").exists()
