"""What is found out about the launcher of this process."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from finetune.core import distributed, launcher


@pytest.fixture
def parent(monkeypatch):
    """Sets the parent process: its command line and environment."""

    def parent(command, **environment):
        process = SimpleNamespace(pid=1, cmdline=command.split, environ=lambda: environment)
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
    monkeypatch.setattr(distributed.joblib, "cpu_count", lambda: 6)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    distributed.use_available_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=1))
    assert threads == ([4] if taken else [])


@pytest.mark.parametrize(("device", "processes"), [("cuda", 1), ("cpu", 2)])
def test_threads_are_left_to_the_launch_on_a_gpu_and_for_several_processes(parent, monkeypatch, device, processes):
    parent("bash")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    distributed.use_available_cores(SimpleNamespace(device=torch.device(device), num_processes=processes))
