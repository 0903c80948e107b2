"""Under schedulers, containers and service managers: the commands with which nothing is lost, and none runs on."""

import json
import os
import shutil
import signal
import stat
import sys

import psutil
import pytest
import yaml

from finetune.run import checkpoint
from harness.compare import history, newest_step, valid_checkpoints
from harness.configs import ROOT, write_config, write_endless
from harness.processes import run, start_command, wait_for
from harness.supervisors import DOCKER, KUBERNETES, PATIENT, PYTHON, SLURM, SYSTEMD, TWO, Job

pytestmark = pytest.mark.slow
LAUNCH = ROOT / "configs/launch"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_endless(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("command", "supervisor", "number"),
    [
        (PYTHON, SLURM, signal.SIGUSR1),
        (TWO, SYSTEMD, signal.SIGHUP),
        (TWO, KUBERNETES, signal.SIGTERM),
    ],
    ids=["python, Slurm", "two, systemd", "two, Kubernetes"],  # python under Docker and two under Slurm: below
)
def test_nothing_is_lost_under_a_supervisor(config, tmp_path, command, supervisor, number):
    job = Job(*command, "--config", config, output_dir=tmp_path / "run", **PATIENT)
    outcome, seconds = job.end(supervisor, number)
    assert outcome.stdout.count("everything is saved") == 1, outcome
    assert outcome.returncode == (143 if command == PYTHON else 1)
    if command == PYTHON:  # progress, but no traceback and no library's warning, not even of its import
        assert {line.partition(":")[0] for line in outcome.stderr.splitlines()} <= {"", "Decoding images"}
    assert seconds < supervisor.seconds
    (saved,) = valid_checkpoints(tmp_path / "run")
    assert history(tmp_path / "run")[-1]["step"] == saved


@pytest.mark.parametrize(
    ("command", "supervisor", "returned"),
    [(PYTHON, DOCKER, 143), (TWO, SLURM, 1)],
    ids=["python, Docker", "two, Slurm"],
)
def test_with_nohup_a_run_outlives_its_terminal(config, tmp_path, command, supervisor, returned):
    """And nothing is lost when it is ended afterwards.

    The launcher of several processes handles SIGHUP though it was started with it ignored, unless told otherwise.
    """
    environment = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT"}
    job = Job("nohup", *command, "--config", config, output_dir=tmp_path / "run", **environment)
    for process in job.processes():
        process.send_signal(signal.SIGHUP)
    step = newest_step(tmp_path / "run")
    wait_for(lambda: newest_step(tmp_path / "run") > step + 20, job.main)
    outcome, seconds = job.end(supervisor, signal.SIGTERM)
    assert outcome.stdout.count("everything is saved") == 1, outcome
    assert outcome.returncode == returned
    assert seconds < supervisor.seconds
    (saved,) = valid_checkpoints(tmp_path / "run")
    assert history(tmp_path / "run")[-1]["step"] == saved


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="no right to make a PID namespace here")
def test_as_process_1_of_a_container_nothing_is_lost(config, tmp_path):
    """The kernel does not give process 1 a signal that it has no handler for, and kills the others when it ends."""
    container = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *PYTHON)
    job = Job(*container, "--config", config, output_dir=tmp_path / "run")
    (first,) = psutil.Process(job.main.pid).children()
    first.send_signal(signal.SIGTERM)
    output, _ = job.main.communicate(timeout=60)
    assert output.count("everything is saved") == 1
    assert len(valid_checkpoints(tmp_path / "run")) == 1
    assert job.processes() == []


def test_a_killed_process_is_started_again_and_a_run_that_was_asked_to_stop_is_not(config, tmp_path):
    """The other process ends with it, as it does where nothing is started again."""
    restarts = [*TWO[:-1], "--max_restarts", "3", TWO[-1]]
    output_dir = tmp_path / "run"
    job = Job(*restarts, "--config", config, "checkpoint.every_steps=5", output_dir=output_dir)
    wait_for(lambda: any(output_dir.glob("checkpoint-*")), job.main)
    first = job.trainers()
    first[-1].kill()
    _, alive = psutil.wait_procs(first, timeout=20)  # after 30 s the launcher kills what is left
    assert alive == []
    assert {checkpoint.flaw(folder) for folder in output_dir.glob("checkpoint-*")} == {None}
    known = newest_step(output_dir)
    wait_for(lambda: newest_step(output_dir) > known, job.main)
    job.trainers()[-1].send_signal(signal.SIGUSR1)
    output, errors = job.main.communicate(timeout=120)
    assert job.processes() == []
    assert errors.count("error: launch: another process of this run ended") == 1
    assert output.count("Resuming from") == 1, errors
    assert output.count("everything is saved") == 1
    assert job.main.returncode == 1
    assert history(output_dir)[-1]["step"] == valid_checkpoints(output_dir)[-1] > known


# Slurm's commands, as far as configs/launch/slurm.sh needs them: a job of one host with one step, whose processes are
# killed when the first of them has ended.
SRUN = """#!{python}
import os, pathlib, psutil, subprocess, sys
step = subprocess.Popen(sys.argv[1:], env=dict(os.environ, SLURM_NODEID="0"))
pathlib.Path(os.environ["STATE"], "step").write_text(str(step.pid))
code = step.wait()
for process in psutil.process_iter():
    try:
        if "SLURM_NODEID" in process.environ() and process.environ().get("TESTED_JOB") == os.environ["TESTED_JOB"]:
            process.kill()
    except psutil.Error:
        pass
sys.exit(code)
"""
SCANCEL = """#!{python}
import os, pathlib, psutil, signal, sys
assert sys.argv[1:] == ["--signal=USR1", "77"], sys.argv
step = psutil.Process(int(pathlib.Path(os.environ["STATE"], "step").read_text()))
for process in [step, *step.children(recursive=True)]:
    process.send_signal(signal.SIGUSR1)
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo 127.0.0.1; else echo "$@" >> "$STATE/asked"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of one host and two processes, with Slurm's commands; and what they were asked for."""
    (tmp_path / "bin").mkdir()
    launcher = f'#!/bin/bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
    commands = {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}
    for name, text in (commands | {"accelerate": launcher}).items():
        (tmp_path / "bin" / name).write_text(text.replace("{python}", sys.executable))
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    asked = tmp_path / "asked"
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STATE": str(tmp_path), "SLURM_JOB_ID": "77"}
    return environment | {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "here"}, asked


def test_the_batch_file_of_slurm_saves_ahead_of_the_limit_and_asks_to_be_queued_again(config, tmp_path, slurm):
    environment, asked = slurm
    job = Job("bash", LAUNCH / "slurm.sh", "--config", config, output_dir=tmp_path / "run", **environment)
    job.main.send_signal(signal.SIGUSR1)  # to the batch script alone, as with B: in --signal
    output, errors = job.main.communicate(timeout=120)
    assert output.count("everything is saved") == 1, errors
    assert "2 process(es)" in output
    assert job.processes() == []
    assert len(valid_checkpoints(tmp_path / "run")) == 1
    assert asked.read_text() == "requeue 77\n"


def test_the_batch_file_of_slurm_does_not_queue_a_mistake_again(config, slurm):
    environment, asked = slurm
    command = ("bash", LAUNCH / "slurm.sh", "--config", config, "training.num_epochs=never")
    process = start_command(*command, TESTED_JOB="mistake", **environment | {"SLURM_GPUS_ON_NODE": "1"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("error: command line: training.num_epochs: ") == 1
    assert not asked.exists()


def test_the_container_example_starts_train_py_itself_behind_an_init(tmp_path):
    """A shell in between would keep the signal, and as process 1 train.py would get none before it has a handler."""
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    (entry,) = [line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry) == ["python", "train.py"]
    (copied,) = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "train.py" in line]
    assert all((ROOT / name).exists() for name in copied)
    service = yaml.safe_load((LAUNCH / "compose.yaml").read_text())["services"]["train"]
    assert service["init"] is True
    assert service["stop_grace_period"] == "5m"
    named = service["environment"]["ACCELERATE_CONFIG_FILE"]
    assert (ROOT / named).is_file()
    command = [word for word in service["command"] if not word.startswith("output_dir=")]
    launch = {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "bf16", "use_cpu": True}
    file = write_config(tmp_path / "accelerate.yaml", launch)
    environment = {"ACCELERATE_CONFIG_FILE": str(file)}
    checked = run(*command, f"output_dir={tmp_path}/run", "--check", folder=tmp_path, **environment)
    assert "bf16" in checked.stdout
    assert checked.returncode == 0, checked.stderr
