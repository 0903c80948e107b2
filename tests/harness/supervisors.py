"""Supervisors of a job, as far as ending it goes: who gets the signal, how long is waited, what is killed afterwards.

Slurm, Docker, Kubernetes and systemd find all processes of a job by its cgroup. Here they are found by a word in their
environment, which no process of a job takes out, whatever its session and its parent.
"""

import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.processes import Outcome, start_command, wait_for

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no")
PYTHON = (sys.executable, "train.py")
ONE = (*LAUNCH, "--num_processes", "1", "--quiet", "train.py")
TWO = (*LAUNCH, "--num_processes", "2", "--multi_gpu", "--main_process_port", "0", "train.py")
# The launcher of several processes passes on SIGUSR1 too, and gives them more than 30 seconds.
PATIENT = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}


class Supervisor(NamedTuple):
    """How a job is ended: a signal to all its processes or to the first one alone; what is left when the first one has
    ended, or after so many seconds, is killed."""

    to_all: bool
    seconds: float


SLURM = Supervisor(to_all=True, seconds=30)  # KillWait
SYSTEMD = Supervisor(to_all=True, seconds=90)  # KillMode=control-group, TimeoutStopSec
DOCKER = Supervisor(to_all=False, seconds=10)  # docker stop
KUBERNETES = Supervisor(to_all=False, seconds=30)  # terminationGracePeriodSeconds


class Job:
    """A command with all that it starts, since its first update was logged."""

    def __init__(self, *command: str | Path, output_dir: Path, **environment: str):
        self._word = uuid.uuid4().hex
        self.output_dir = output_dir
        self.main = start_command(*command, f"output_dir={output_dir}", TESTED_JOB=self._word, **environment)
        metrics = output_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and "train/loss" in metrics.read_text(), self.main)

    def processes(self) -> list[psutil.Process]:
        """All that are alive, zombies left out."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get("TESTED_JOB") == self._word:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def trainers(self) -> list[psutil.Process]:
        """The processes that train: those of train.py, without launchers and data workers."""
        own = {process.pid: process for process in self.processes() if "train.py" in process.cmdline()[1:3]}
        return [process for process in own.values() if process.ppid() not in own]

    def end(self, supervisor: Supervisor, number: signal.Signals) -> tuple[Outcome, float]:
        """What the first process printed and returned, and the seconds from the signal to its end."""
        start = time.monotonic()
        for process in self.processes() if supervisor.to_all else [psutil.Process(self.main.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            self.main.wait(supervisor.seconds)
        seconds = time.monotonic() - start
        self.kill()
        output, errors = self.main.communicate(timeout=30)
        return Outcome(self.main.returncode, output, errors), seconds

    def kill(self) -> None:
        """Kill all that is left."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
