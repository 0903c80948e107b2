"""Signal handling: a signal is noted, and the run ends at the next point where nothing is lost."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import torch

from finetune.core.groups import gathered, summed
from finetune.core.launcher import end_launcher, restarts_left

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_ECHO_SECONDS = 2.0


class Interrupted(Exception):  # noqa: N818 - not an error: a process was asked to stop
    """Raised on all processes, at a point where nothing is lost, after any of them was told to stop."""


class StopRequest:
    """Notes the first signal; a second one ends the process at once.

    Signals within two seconds of the first are taken for copies of it: a scheduler signals every process of a job, and
    the launcher of several processes passes on what it got. SIGUSR1, which Slurm can send ahead of its time limit, and
    SIGHUP, which comes when a terminal is closed, are treated like SIGTERM. An ignored SIGHUP stays ignored (`nohup`).
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first, self._parent = 0.0, os.getppid()
        self._terminals = [file.fileno() for file in (sys.__stdout__, sys.__stderr__) if file and file.isatty()]
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._leave_terminals()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
        elif self._parent != os.getppid():  # the end of the launcher sent this SIGTERM: nobody asked twice
            self._parent, self._first = os.getppid(), now
        elif now - self._first > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _leave_terminals(self) -> None:
        """Discard further output: writing to a closed terminal would fail, and end the run before it is saved."""
        with open(os.devnull, "w") as nowhere:
            for terminal in self._terminals:
                os.dup2(nowhere.fileno(), terminal)

    def requested(self) -> bool:
        """Whether this process was told to stop; others may not have been."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT; 143 after any other signal, and where another process got it."""
        return 128 + (signal.SIGINT if self.signal == signal.SIGINT else signal.SIGTERM)


class StopCheck:
    """Asks between two steps of an evaluation whether any process was told to stop; costs one tiny reduction."""

    def __init__(self, requested: Callable[[], bool]):
        self.requested = requested

    def __call__(self) -> None:
        """Raises Interrupted on all processes if any of them was told to stop."""
        if summed(torch.tensor(float(self.requested()))).item() > 0:
            raise Interrupted


def prevent_restart() -> None:
    """Have torch's elastic launcher end, where it would start a run again that was asked to stop (`--max_restarts`).

    It takes any exit code but 0 for a failure, and 0 would tell a scheduler that the run is finished. Called by all
    processes, after everything is saved: none leaves before the launchers of all hosts know.
    """
    if not restarts_left():
        return
    for number in SIGNALS:  # the launcher passes on what it gets
        signal.signal(number, signal.SIG_IGN)
    gathered(None)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        end_launcher()
    gathered(None)
