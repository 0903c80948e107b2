"""train.py as a command, its last lines included, in forked processes that have all imports done and start at once."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import train  # noqa: F401 - so that a fork need not import anything
from tiny import ROOT, forget_processes


class Outcome(NamedTuple):
    returncode: int  # negative: the signal that killed it
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell what was wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Script:
    """A train.py that runs."""

    def __init__(self, arguments: tuple, folder: Path, before: Callable[[], None], environment: dict[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"out-{time.monotonic_ns()}", folder / f"err-{time.monotonic_ns()}"]
        self.pid = os.fork()
        if self.pid == 0:
            self._be(arguments, before, environment)

    def _be(self, arguments: tuple, before: Callable[[], None], environment: dict[str, str]) -> None:
        code = 1
        try:
            sys.stdout, sys.stderr = (open(file, "w", buffering=1) for file in self.files)  # noqa: SIM115
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            os.environ |= environment
            forget_processes()
            multiprocessing.process._children.clear()  # workers of the process that forked, which are not ours to end
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # of runs in the process that forked
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            before()
            sys.argv = ["train.py", *map(str, arguments)]
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            threading._shutdown()  # as an interpreter that ends waits for its threads
            os._exit(code)

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60) -> Outcome:
        end = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"train.py did not end in {seconds} s: {self.files[1].read_text()[-2000:]}")
            time.sleep(0.01)
        return Outcome(os.waitstatus_to_exitcode(status), *(file.read_text() for file in self.files))


def nothing() -> None: ...


def script(*arguments: str | Path, folder: Path, before: Callable[[], None] = nothing, **environment: str) -> Outcome:
    """train.py to its end. `before` runs in its process; `folder` takes what it prints."""
    return Script(arguments, folder, before, environment).wait()


def two(
    *arguments: str | Path, folder: Path, before: Callable[[int], None] = lambda process: None, **environment: str
) -> list[Script]:
    """train.py on two processes that know each other, as the launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    return [
        Script(arguments, folder, partial(before, process), environment | {"RANK": number, "LOCAL_RANK": number})
        for process, number in enumerate("01")
    ]


def at_call(owner: object, name: str, call: int, act: Callable[[], None], after: bool = False) -> None:
    """Have something happen at the call-th call of a function."""
    function, calls = getattr(owner, name), []

    def watched(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call and not after:
            act()
        result = function(*arguments, **keywords)
        if len(calls) == call and after:
            act()
        return result

    setattr(owner, name, watched)
