"""Resuming from a checkpoint by name: nothing that exists is destroyed, and a branch is a run like any other."""

import signal
from functools import partial

import pytest

from finetune.run import checkpoint
from finetune.run.run import Run
from finetune.training.window import Window
from harness.compare import differing, history, valid_checkpoints
from harness.configs import EVALUATED_STEPS
from harness.faults import kill_at, signal_at, stop_after_updates
from harness.processes import finish, nothing, run
from harness.undisturbed import undisturbed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run of 12 updates with checkpoints 3, 6, 9 and 12, and its command."""
    return undisturbed(
        tmp_path_factory.mktemp("base"),
        images=24,  # 3 windows of 8 an epoch
        before=nothing,
        training__num_epochs=4,
        checkpoint={"every_steps": 3, "keep": 10},
        logging={"tracker": "tensorboard"},
    )


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(base):
    output_dir = base / "run"
    before = contents(output_dir)
    command = ("--config", base / "config.yaml", f"checkpoint.resume={output_dir / 'checkpoint-3'}")
    changes = ("checkpoint.every_steps=2", "checkpoint.keep=3", "training.max_train_steps=7")
    for flags in ((), ("--check",)):
        refused = run(*command, *changes, *flags, folder=base)
        assert refused.returncode == 2
        assert refused.error.startswith(f"checkpoint.resume: {output_dir / 'checkpoint-3'} is older than checkpoint-12")
        assert "set another output_dir to branch off from it" in refused.error
        assert contents(output_dir) == before


def test_a_branch_is_the_run_that_it_came_from_until_something_is_changed(base, tmp_path):
    output_dir = tmp_path / "branch"
    before = contents(base / "run")
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}")
    command += (f"checkpoint.resume={base / 'run/checkpoint-6'}",)
    finish(*command, folder=tmp_path)
    assert valid_checkpoints(output_dir) == [6, 9, 12]
    assert differing(base / "run", output_dir, 12) == []
    assert contents(base / "run") == before


@pytest.mark.parametrize("resume", ["the same command", "auto"])
@pytest.mark.parametrize(
    ("before", "code", "saved"),
    [
        (partial(stop_after_updates, 1), 143, [6, 7]),
        (partial(kill_at, Run, "finish_step", 2), -9, [6]),
        (partial(kill_at, checkpoint, "save", 1, after=True), -9, [6]),
    ],
    ids=["stopped in its first update", "killed in its second", "killed after the copy of the checkpoint"],
)
def test_a_branch_resumes_with_the_same_command_and_with_auto(base, tmp_path, resume, before, code, saved):
    output_dir = tmp_path / "branch"
    named = f"checkpoint.resume={base / 'run/checkpoint-6'}"
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}")
    assert run(*command, named, folder=tmp_path, before=before).returncode == code
    assert valid_checkpoints(output_dir) == saved
    resumed = finish(*command, *([named] if resume != "auto" else []), folder=tmp_path)
    assert f"Resuming from {output_dir}/checkpoint-{saved[-1]}" in resumed.stdout
    assert differing(base / "run", output_dir, 12) == []


def test_a_branch_that_is_killed_before_its_first_checkpoint_starts_again(base, tmp_path):
    output_dir = tmp_path / "branch"
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}")
    command += (f"checkpoint.resume={base / 'run/checkpoint-6'}",)
    assert run(*command, folder=tmp_path, before=partial(kill_at, checkpoint, "save", 1)).returncode == -9
    assert valid_checkpoints(output_dir) == []
    finish(*command, folder=tmp_path)
    assert differing(base / "run", output_dir, 12) == []


def test_a_branch_with_another_setting_prints_it_and_keeps_the_metrics_up_to_the_branch_point(base, tmp_path):
    output_dir = tmp_path / "branch"
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}", "optimizer.learning_rate=0.002")
    branched = finish(*command, f"checkpoint.resume={base / 'run/checkpoint-6'}", folder=tmp_path)
    assert f"Resuming from {base / 'run/checkpoint-6'}: step 6 of 12." in branched.stdout
    assert "optimizer.learning_rate: 0.001 in the checkpoint, 0.002 now" in branched.stdout
    rates = {line["step"]: line["train/learning_rate"] for line in history(output_dir)}
    assert rates == {step: 0.001 if step <= 6 else 0.002 for step in range(1, 13)}


def test_a_run_that_names_its_own_newest_checkpoint_resumes_with_the_same_command_and_keeps_it(undisturbed, tmp_path):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    stop = partial(signal_at, signal.SIGTERM, Window, "add", 1)
    assert run(*command, folder=tmp_path, before=stop).returncode == 143
    assert valid_checkpoints(output_dir) == [1]
    named = f"checkpoint.resume={output_dir / 'checkpoint-1'}"
    assert run(*command, named, folder=tmp_path, before=partial(kill_at, Run, "save", 2)).returncode == -9
    assert valid_checkpoints(output_dir) == [1, 2]
    resumed = finish(*command, named, folder=tmp_path)
    expected = f"Resuming from {output_dir}/checkpoint-2, which was trained on from {output_dir}/checkpoint-1: step 2"
    assert expected in resumed.stdout
    assert valid_checkpoints(output_dir) == [1, 4, 6]  # keep is 2
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["run", "check"])
def test_a_checkpoint_that_does_not_exist_is_refused_before_a_folder_is_made(base, tmp_path, flags):
    output_dir = tmp_path / "run"
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}")
    refused = run(*command, "checkpoint.resume=nowhere", *flags, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.error == "checkpoint.resume: found nowhere, which is no folder; expected auto, never or a checkpoint"
    assert not output_dir.exists()


def test_a_checkpoint_of_another_run_is_refused_before_a_folder_is_made(base, tmp_path):
    output_dir, named = tmp_path / "run", base / "run/checkpoint-6"
    command = ("--config", base / "config.yaml", f"output_dir={output_dir}", "seed=4")
    refused = run(*command, f"checkpoint.resume={named}", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.errors[0] == f"{named} is of another run: seed: 3 in the checkpoint, 4 now"
    assert not output_dir.exists()


@pytest.mark.parametrize("flags", [(), ("--check",)], ids=["run", "check"])
def test_a_run_that_is_already_past_the_length_asked_for_is_refused_and_nothing_written(base, flags):
    before = contents(base / "run")
    refused = run("--config", base / "config.yaml", "training.max_train_steps=5", *flags, folder=base)
    assert refused.returncode == 2
    assert refused.error.startswith(
        f"training: found a length of 5 updates, but {base / 'run/checkpoint-12'} is past it, at step 12; set "
        "max_train_steps to 12 or more"
    )
    assert contents(base / "run") == before
