"""What is found out about the launcher of this process."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from finetune.core import launch, launcher
from harness.configs import ROOT


@pytest.fixture
def parent(monkeypatch):
    """Sets the parent process: its command line and environment."""

    def parent(command, **environment):
        process = SimpleNamespace(pid=1, cmdline=command.split, environ=lambda: environment, parent=lambda: None)
        monkeypatch.setattr(psutil, "Process", lambda pid: process)
        return process

    return parent


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("/venv/bin/python3 /venv/bin/accelerate launch train.py", True),
        ("/venv/bin/python3 /venv/bin/accelerate-launch train.py", True),
        ("python -m accelerate.commands.launch train.py", True),
        ("/venv/bin/python3 /venv/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python -u -m torch.distributed.run train.py", True),
        ("bash", False),
        ("bash /home/me/accelerate/run.sh", False),
        ("/sbin/init", False),
        ("slurmstepd: [42.batch]", False),
        ("", False),  # a zombie's
    ],
)
def test_a_parent_is_a_launcher_by_its_command_line(parent, command, found):
    process = parent(command)
    assert launcher.launcher() is (process if found else None)


def test_a_launcher_is_found_behind_a_shell_script(parent):
    agent = parent("torchrun --no-python run.sh")
    parent("bash run.sh").parent = lambda: agent
    assert launcher.launcher() is agent


def test_a_parent_that_is_gone_is_no_launcher(monkeypatch):
    def gone(pid):
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", gone)
    assert launcher.launcher() is None


@pytest.mark.parametrize(
    ("command", "given", "own", "taken"),
    [
        ("accelerate launch train.py", {}, {"OMP_NUM_THREADS": "1"}, True),
        ("accelerate launch train.py", {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, False),
        ("accelerate launch train.py", {"MKL_NUM_THREADS": "1"}, {"MKL_NUM_THREADS": "1"}, False),
        ("accelerate launch --num_cpu_threads_per_process 1 train.py", {}, {"OMP_NUM_THREADS": "1"}, False),
        ("accelerate launch --num-cpu-threads-per-process=1 train.py", {}, {"OMP_NUM_THREADS": "1"}, False),
        ("bash", {}, {}, True),
        ("bash", {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, False),
        ("bash", {}, {"OMP_NUM_THREADS": "1"}, False),
    ],
)
def test_available_cores_are_taken_unless_the_user_gave_a_number(parent, monkeypatch, command, given, own, taken):
    parent(command, **given)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in own.items():
        monkeypatch.setenv(variable, value)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(launch.joblib, "cpu_count", lambda: 6)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    launch.use_available_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert threads == ([4] if taken else [])


@pytest.mark.parametrize(
    ("rank", "command", "problems", "waits"),
    [("0", "torchrun", ("mistake",), []), ("1", "torchrun", (), [60.0]), ("1", "bash", (), [])],
)
def test_the_first_process_tells_and_the_others_wait_for_their_launcher(
    parent, monkeypatch, rank, command, problems, waits
):
    """Which ends all of them when one has failed, before the first has printed its line."""
    parent(command)
    waited = []
    monkeypatch.setattr(launcher.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    assert launcher.launch_error("mistake").problems == problems
    assert waited == waits


@pytest.mark.parametrize(("device", "processes"), [("cuda", 1), ("cpu", 2)])
def test_threads_are_left_to_the_launch_on_a_gpu_and_for_several_processes(parent, monkeypatch, device, processes):
    parent("bash")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    launch.use_available_cores(SimpleNamespace(device=torch.device(device), num_processes=processes))


STARTED = """
import os, signal, sys, time
from finetune.core.launcher import prepare_for_imports
def stop(*_):
    print("told", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
sys.platform = os.environ["PRETENDED"]
prepare_for_imports()
print(os.getpid(), flush=True)
time.sleep(20)
"""
STARTER = "import subprocess, sys, time; subprocess.Popen(sys.argv[2:]); time.sleep(20)"


def start_by(tmp_path, name, *between, platform=sys.platform):
    """A program of this name that started train.py's first lines, with words between the two; and their process."""
    starter, script = tmp_path / name, tmp_path / "script.py"
    starter.write_text(STARTER)
    script.write_text(STARTED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PRETENDED": platform}
    command = [sys.executable, starter, "--", *between, sys.executable, script]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    return started, int(started.stdout.readline())


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("between", [(), ("bash", "-c", '"$@"; true', "bash")], ids=["its child", "behind a script"])
def test_a_process_is_told_that_its_launcher_is_gone(tmp_path, platform, between):
    """On Linux by the kernel; elsewhere, and behind a shell script, it watches."""
    started, _ = start_by(tmp_path, "torchrun", *between, platform=platform)
    started.kill()
    assert started.stdout.read() == "told\n"  # to the end of all that hold it
    started.wait()


@pytest.mark.slow
def test_a_process_outlives_what_started_it_if_that_is_no_launcher(tmp_path):
    started, process = start_by(tmp_path, "start.py")
    started.kill()
    started.wait()
    time.sleep(2.5)
    os.kill(process, signal.SIGKILL)
    assert started.stdout.read() == ""


def test_a_process_whose_launcher_ended_before_its_first_line_is_told(tmp_path):
    """It sees a parent that is no launcher, and in its environment what only a launcher sets."""
    for mark in ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"):
        script = tmp_path / "script.py"
        script.write_text(STARTED)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PRETENDED": sys.platform, mark: "1"}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert done.stdout == "told\n"
        assert done.stderr == "error: launch: the launcher of this process ended before it started\n"


IMPORTING = """
import gc
from finetune.core.launcher import imports_done, prepare_for_imports
prepare_for_imports()
assert not gc.isenabled()
imported = [[] for _ in range(100_000)]
imports_done()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
made = [[] for _ in range(1000)]
gc.collect()
assert 1000 < len(gc.get_objects()) < 50_000, "what was imported is searched"
"""


def test_garbage_is_collected_after_the_imports_and_never_among_what_was_imported():
    subprocess.run([sys.executable, "-c", IMPORTING], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
