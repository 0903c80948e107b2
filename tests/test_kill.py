"""Killed in the middle of anything, the same command goes on, and the result is that of the undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from diffusers import DDPMPipeline

import train
from finetune import checkpoint, evaluation, manifest, model, pictures, report, run
from tiny import curves, differing, run_in_child, tiny_config, write_pictures

STEPS = 6  # 19 images, 2 of them held out, in windows of 8: 8 + 8 + 1, twice


def full_config(images, output_dir):
    return tiny_config(
        images,
        output_dir,
        data__validation_fraction=0.1,
        checkpoint={"every_steps": 2, "keep": 2},
        validation={"every_steps": 3, "images": 4},
        samples={"every_steps": 3, "count": 2, "inference_steps": 2},
        logging__tracker="tensorboard",
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    base = tmp_path_factory.mktemp("undisturbed")
    config = full_config(write_pictures(base / "pictures", 19), base / "run")
    assert os.waitpid(run_in_child(config, base / "config.yaml"), 0)[1] == 0
    assert [step for step, _ in curves(base / "run")["train/loss"]] == [1, 2, 3, 4, 5, 6]
    return base


def killing(owner, name, call, after=False):
    """Dies at the call-th call of a function, before or after it."""
    function, calls = getattr(owner, name), []

    def fatal(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **keywords)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


KILLS = {
    "before the first update": (train.Window, "add", 1),
    "inside a window": (train.Window, "add", 8),
    "between an update and its checkpoint": (run.Run, "save", 2),
    "weights half saved": (checkpoint, "save_file", 2),
    "before the manifest": (manifest, "seal", 2),
    "after the manifest": (manifest, "seal", 2, True),
    "before the renaming": (Path, "rename", 2),
    "after the renaming": (Path, "rename", 2, True),
    "before pruning": (checkpoint, "_by_step", 3),  # the first is resuming's
    "while pruning": (checkpoint.shutil, "rmtree", 1),
    "in the first validation": (evaluation.Validation, "losses", 1, True),
    "in a later validation": (evaluation.Validation, "losses", 4),
    "while sampling": (run, "sample", 2, True),
    "while drawing": (pictures, "tiled", 3),
    "after a line of metrics": (report.History, "add", 5, True),
    "before the export": (model, "save_pipeline", 1),
    "while exporting": (DDPMPipeline, "save_pretrained", 1, True),
    "after the export": (model, "save_pipeline", 1, True),
    "at the curve": (pictures, "loss_curve", 1),
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_killed_once(undisturbed, tmp_path, kill):
    config = full_config(undisturbed / "pictures", tmp_path / "run")
    file = tmp_path / "config.yaml"
    _, status = os.waitpid(run_in_child(config, file, lambda: killing(*kill)), 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    whole = [folder for folder in (tmp_path / "run").glob("checkpoint-*") if checkpoint.flaw(folder) is None]
    assert len(whole) == len(list((tmp_path / "run").glob("checkpoint-*")))
    assert os.waitpid(run_in_child(config, file), 0)[1] == 0
    assert differing(undisturbed / "run", tmp_path / "run", STEPS) == []
    left = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {path.name for path in (undisturbed / "run").iterdir()}
    assert left == expected
    DDPMPipeline.from_pretrained(tmp_path / "run/pipeline")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    "moment",
    [(train.Window, "add", 3), (evaluation.Validation, "losses", 2), (evaluation.Validation, "_predict", 1)],
    ids=["window", "between validations", "validation"],
)
def test_told_to_stop(undisturbed, tmp_path, number, moment):
    """The window or the step of an evaluation is finished, a checkpoint saved, and the exit code says which signal."""
    config = full_config(undisturbed / "pictures", tmp_path / "run")
    file = tmp_path / "config.yaml"

    def sabotage():
        owner, name, call = moment
        function, calls = getattr(owner, name), []

        def told(*arguments, **keywords):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # the echo of a launcher that passes it on
            return function(*arguments, **keywords)

        setattr(owner, name, told)

    _, status = os.waitpid(run_in_child(config, file, sabotage), 0)
    assert os.WEXITSTATUS(status) == (130 if number == signal.SIGINT else 143)
    saved = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == ({"checkpoint-2"} if moment[0] is train.Window else {"checkpoint-0"})
    assert os.waitpid(run_in_child(config, file), 0)[1] == 0
    assert differing(undisturbed / "run", tmp_path / "run", STEPS) == []


def test_a_second_signal_ends_at_once(undisturbed, tmp_path):
    config = full_config(undisturbed / "pictures", tmp_path / "run")

    def sabotage():
        from finetune import stopping

        stopping._ECHO_SECONDS = -1.0
        function = train.Window.add

        def told(*arguments):
            if any((tmp_path / "run").glob("checkpoint-2")):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        train.Window.add = told

    _, status = os.waitpid(run_in_child(config, tmp_path / "config.yaml", sabotage), 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint.flaw(tmp_path / "run/checkpoint-2") is None
