"""Being told to stop: signals are noted, and the run ends at the next point where nothing is lost."""

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_SECONDS = 2.0


class StopRequest:
    """Notes the first signal; a second one ends the process at once.

    What comes within two seconds of the first is its echo: a scheduler signals every process of a job, and the launcher
    of several processes passes on what it got. SIGUSR1, which SLURM can send ahead of its time limit, is as SIGTERM.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._first = 0.0

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
        elif now - self._first > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def requested(self) -> bool:
        """Whether this process was told to stop; others may not have been."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT; 143 after any other, and where another process was the one told."""
        return 128 + (signal.SIGINT if self.signal == signal.SIGINT else signal.SIGTERM)
