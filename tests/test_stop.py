"""Told to stop, or left alone by another process: through the real script, on one process and on two."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from diffusers import UNet2DModel
from scripted import at_call, script, two

from finetune import checkpoint, manifest
from test_kill import full_config
from tiny import ROOT, differing, write_config, write_pictures

STEPS = 6
STOPPED = "Stopped after step {} of 6; all is saved, and the same command goes on from there."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Pictures, an undisturbed run on one process, and one on two."""
    base = tmp_path_factory.mktemp("base")
    pictures = write_pictures(base / "pictures", 19)
    for name in ("one", "two"):
        config = full_config(pictures, base / name)
        config["training"]["micro_batch_size"] = 4 if name == "one" else 2
        write_config(base / f"{name}.yaml", config)
    assert script("--config", base / "one.yaml", folder=base).returncode == 0
    assert {each.wait().returncode for each in two("--config", base / "two.yaml", folder=base)} == {0}
    return base


def forwards(act, call, tally):
    """Something happens at the call-th forward pass; how many there were stands in a file."""
    at_call(UNet2DModel, "forward", call, act)
    watched = UNet2DModel.forward

    def counted(*arguments, **keywords):
        with open(tally, "a") as file:
            file.write(".")
        return watched(*arguments, **keywords)

    UNet2DModel.forward = counted


def tell(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "call", "finished", "saved"),
    [
        # Forward passes: 1 that counts operations, 2 of the first validation (plain, averaged), 2 of sampling, 1 of the
        # strip, 2 of each update.
        (signal.SIGTERM, 2, 2, 0),
        (signal.SIGINT, 4, 4, 0),
        (signal.SIGTERM, 7, 8, 1),
        (signal.SIGINT, 7, 8, 1),
        (signal.SIGUSR1, 8, 8, 1),
    ],
)
def test_one_step_more_at_the_most(base, tmp_path, number, call, finished, saved):
    arguments = ("--config", base / "one.yaml", f"output_dir={tmp_path / 'run'}")
    before = partial(forwards, partial(tell, number), call, tmp_path / "tally")
    told = script(*arguments, folder=tmp_path, before=before)
    assert told.returncode == (130 if number == signal.SIGINT else 143), told.stderr
    assert len((tmp_path / "tally").read_text()) == finished
    assert told.stdout.count(STOPPED.format(saved)) == 1
    assert "Traceback" not in told.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert script(*arguments, folder=tmp_path).returncode == 0
    assert differing(base / "one", tmp_path / "run", STEPS) == []


@pytest.mark.parametrize("moment", ["loading", "importing"])
def test_before_there_is_anything_to_save(base, tmp_path, moment):
    arguments = ("--config", base / "one.yaml", f"output_dir={tmp_path / 'run'}")
    from finetune import launch, model

    owner, name = (model, "load_model") if moment == "loading" else (launch, "on_main_process")
    told = script(*arguments, folder=tmp_path, before=lambda: at_call(owner, name, 1, partial(tell, signal.SIGINT)))
    assert told.returncode == 130
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("told", [(1,), (0, 1)])
@pytest.mark.parametrize("call", [3, 7])  # of a process's own forward passes: in sampling, in the first update
def test_one_of_two_stops_both_in_step(base, tmp_path, told, call):
    def before(process):
        if process in told:
            at_call(UNet2DModel, "forward", call, partial(tell, signal.SIGTERM, signal.SIGTERM))

    arguments = ("--config", base / "two.yaml", f"output_dir={tmp_path / 'run'}")
    outcomes = [each.wait() for each in two(*arguments, folder=tmp_path, before=before)]
    assert [outcome.returncode for outcome in outcomes] == [143, 143], outcomes
    assert sum(outcome.stdout.count("Stopped after") for outcome in outcomes) == 1
    assert not any("Traceback" in outcome.stderr for outcome in outcomes)
    saved = list((tmp_path / "run").glob("checkpoint-*"))
    assert saved
    assert all(checkpoint.flaw(folder) is None for folder in saved)
    assert {each.wait().returncode for each in two(*arguments, folder=tmp_path)} == {0}
    assert differing(base / "two", tmp_path / "run", STEPS) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_is_killed(base, tmp_path, killed):
    def before(process):
        if process == killed:
            at_call(UNet2DModel, "forward", 13, partial(tell, signal.SIGKILL))

    arguments = ("--config", base / "two.yaml", f"output_dir={tmp_path / 'run'}")
    outcomes = [each.wait(20) for each in two(*arguments, folder=tmp_path, before=before)]
    left = outcomes[1 - killed]
    assert outcomes[killed].returncode == -signal.SIGKILL
    assert left.returncode == 1, left
    assert len(left.errors) == 1
    assert "another process of this run ended" in left.errors[0]
    assert "Traceback" not in left.stderr
    assert all(checkpoint.flaw(folder) is None for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert {each.wait().returncode for each in two(*arguments, folder=tmp_path)} == {0}
    assert differing(base / "two", tmp_path / "run", STEPS) == []


def test_a_mistake_on_two_processes_is_said_once(base, tmp_path):
    for number, change in enumerate(("training.seed=1", "training.micro_batch_size=3", "data.source=nowhere/at/all")):
        arguments = ("--config", base / "two.yaml", f"output_dir={tmp_path / 'run'}", change)
        arguments += ("training.global_batch_size=8",) if number == 1 else ()
        outcomes = [each.wait() for each in two(*arguments, folder=tmp_path)]
        assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
        assert len([line for outcome in outcomes for line in outcome.errors]) == 1, outcomes
        assert not any("Traceback" in outcome.stderr for outcome in outcomes)
        assert not (tmp_path / "run").exists()


def started(command, file, text=""):
    """A real command, once it has written a file that holds a text."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 100
    while not (file.exists() and text in file.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


LONG = ("training.max_train_steps=100000", "samples.count=0", "logging.tracker=null", "checkpoint.every_steps=100000")


def test_the_command_of_one_process(base, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "train.py", "--config", base / "one.yaml", f"output_dir={run}", *LONG]
    process = started(command, run / "metrics.jsonl", "train/loss")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert output.splitlines()[-1].startswith("Stopped after step ")
    assert "Traceback" not in errors
    (saved,) = run.glob("checkpoint-*")
    assert checkpoint.flaw(saved) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_of_the_launcher(base, tmp_path, number):
    """SIGTERM to all, as a scheduler sends it; SIGKILL to one worker, as the kernel does that wants its memory."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    command += ["train.py", "--config", base / "two.yaml", f"output_dir={run}", *LONG, "checkpoint.every_steps=1"]
    process = started(command, run / "checkpoint-1" / manifest.MANIFEST)
    if number == signal.SIGTERM:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=40)
    assert process.returncode != 0
    if number == signal.SIGTERM:
        assert output.count("Stopped after step ") == 1
    else:
        assert errors.count("error: launch: another process of this run ended") == 1
    assert any(checkpoint.flaw(folder) is None for folder in run.glob("checkpoint-*"))
    assert all(checkpoint.flaw(folder) is None for folder in run.glob("checkpoint-*"))
