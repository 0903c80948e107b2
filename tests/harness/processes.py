"""Starting train.py or another script: forked, which takes no time, or by a real command.

A fork has all imports done and runs the script's last lines included. On one process or two, to its end or not; faults
are injected by a function that runs in the forked process before the script does. A run draws no loss curve unless that
function has it drawn. Where memory is measured, a fork becomes a new interpreter instead.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState

import train  # noqa: F401 - imported here so that no fork needs to
from finetune.run.loss_curve import loss_curve
from harness.configs import ROOT
from harness.faults import leave_out_the_curve
from harness.flops import remember_flops

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

with tempfile.TemporaryDirectory() as unused:  # imports matplotlib and loads its fonts, so that no fork needs to
    loss_curve([{"step": 1, "train/loss": 1.0}], Path(unused, "loss_curve.png"), steps_per_epoch=1)


class Outcome(NamedTuple):
    """How a process ended."""

    returncode: int  # negative: the signal that killed it
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The error lines, without their prefix."""
        return [line.removeprefix("error: ") for line in self.stderr.splitlines() if line.startswith("error: ")]

    @property
    def error(self) -> str:
        """The only error line, which has to be the last thing printed, without a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert len(self.errors) == 1, self
        assert self.stderr.endswith(f"error: {self.errors[0]}\n"), self.stderr
        return self.errors[0]


class Training:
    """A forked script that is running, most often train.py; or, `fresh`, one in an interpreter of its own."""

    def __init__(
        self,
        arguments: Sequence,
        folder: Path,
        before: Callable[[], None],
        environment: dict[str, str],
        script: str = "train.py",
        fresh: bool = False,
    ):
        self.script = ROOT / script
        self._code: int | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        gc.freeze()  # the objects of the tests need not be searched when the run ends
        self.pid = os.fork()
        if self.pid == 0:
            self._run(list(map(str, arguments)), before, environment, fresh)

    def _run(self, arguments: list[str], before: Callable[[], None], environment: dict[str, str], fresh: bool) -> None:
        code = 1
        try:
            sys.stdout, sys.stderr = (open(file, "w", buffering=1) for file in self.files)  # noqa: SIM115
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            os.environ |= environment
            if fresh:
                os.chdir(ROOT)
                os.execv(sys.executable, [sys.executable, str(self.script), *arguments])
            forget_processes()
            multiprocessing.process._children.clear()  # data workers of the process that forked
            for number in SIGNALS:  # a run in the process that forked may have set handlers
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            remember_flops()
            leave_out_the_curve()
            before()
            sys.argv = [self.script.name, *arguments]
            sys.path.insert(0, str(self.script.parent))
            runpy.run_path(str(self.script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            threading._shutdown()  # waits for threads, as an interpreter that exits does
            os._exit(code)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it if it still runs, and wait until it is gone."""
        if self.poll() is None:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def printed(self) -> str:
        """Standard output so far."""
        return self.files[0].read_text()

    def poll(self) -> int | None:
        """The exit code, negative for the signal that killed it; None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else None
        return self._code

    def wait(self, seconds: float = 60) -> Outcome:
        """Wait for the end; a process that takes longer is killed, and TimeoutError raised."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.end()
                raise TimeoutError(
                    f"{self.script.name} did not end in {seconds} s: {self.files[1].read_text()[-2000:]}"
                )
            time.sleep(0.01)
        return Outcome(code, *(file.read_text() for file in self.files))


def nothing(*_: int) -> None: ...


def start(
    *arguments: str | Path,
    folder: Path,
    before: Callable[[], None] = nothing,
    script: str = "train.py",
    **environment: str,
) -> Training:
    """A script on one process. `before` runs in it first; `folder` takes what it prints."""
    return Training(arguments, folder, before, environment, script)


def run(
    *arguments: str | Path,
    folder: Path,
    before: Callable[[], None] = nothing,
    seconds: float = 60,
    script: str = "train.py",
    **environment: str,
) -> Outcome:
    """A script on one process, to its end, within so many seconds."""
    return start(*arguments, folder=folder, before=before, script=script, **environment).wait(seconds)


def finish(
    *arguments: str | Path,
    folder: Path,
    before: Callable[[], None] = nothing,
    seconds: float = 60,
    **environment: str,
) -> Outcome:
    """train.py on one process, to its end, which has to be exit code 0."""
    outcome = run(*arguments, folder=folder, before=before, seconds=seconds, **environment)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome


def start_several(
    processes: int,
    *arguments: str | Path,
    folder: Path,
    before: Callable[[int], None] = nothing,
    script: str = "train.py",
    fresh: bool = False,
    **environment: str,
) -> list[Training]:
    """A script on processes as the launcher would start them. `before` gets the number of its process.

    Args:
        fresh: in new interpreters, from the root of the repository, without `before`.
    """
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    environment.setdefault("ACCELERATE_USE_CPU", "true")
    started = []
    for process in range(processes):
        own = {"RANK": str(process), "LOCAL_RANK": str(process)} if processes > 1 else {}
        started.append(Training(arguments, folder, partial(before, process), environment | own, script, fresh))
    return started


def run_several(
    processes: int,
    *arguments: str | Path,
    folder: Path,
    before: Callable[[int], None] = nothing,
    seconds: float = 60,
    script: str = "train.py",
    **environment: str,
) -> list[Outcome]:
    """A script on processes as the launcher would start them, to their ends, each within so many seconds."""
    started = start_several(processes, *arguments, folder=folder, before=before, script=script, **environment)
    return [process.wait(seconds) for process in started]


start_two, run_two = partial(start_several, 2), partial(run_several, 2)


def default_signals() -> None:
    """In a process that was just forked: what `nohup` and background jobs of a shell ignore is handled again."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start_command(*command: str | Path, **environment: str) -> subprocess.Popen:
    """A real command in a session of its own, on the CPU. Its output is read with `communicate`."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=default_signals,
    )


def in_new_process(function: Callable[..., T], *arguments: Any, **environment: str) -> T:
    """What a function of a module returns or raises in a new interpreter, with these variables set from its start.

    A fork can use what the tests before it have freed in this one's heap: too little memory would then be measured of
    it, and a limit would come too late.
    """
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 200) -> Any:
    """Wait until a condition is true, and return what it returned. A process has to be running all the while."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def forget_processes() -> None:
    """Reset Accelerate's state, which it keeps for the life of a process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
