"""The launcher that started this process, if one did: `accelerate launch` or `torchrun`.

Imports nothing slow, because train.py needs it before its own imports.
"""

import ctypes
import os
import re
import signal
import sys

import psutil

_LAUNCHER = re.compile(r"(.*/)?(accelerate|accelerate-launch|torchrun)|accelerate\.commands\..*|torch\.distributed\..*")
_PR_SET_PDEATHSIG = 1


def prepare_for_imports() -> None:
    """Have Ctrl-C end the process without a traceback until `imports_done`, and the end of the launcher stop it."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with_launcher()


def imports_done() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, so that data workers are ended and files closed."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher is gone, however it ended: no process trains on without it.

    Only on Linux, and only for a launcher's own child: a process that `nohup` or a shell started stays.
    """
    parent = launcher()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent.pid:  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


def launcher() -> psutil.Process | None:
    """The parent of this process, if it is a launcher."""
    try:
        parent = psutil.Process(os.getppid())
        return parent if any(map(_LAUNCHER.fullmatch, parent.cmdline()[:6])) else None
    except psutil.Error:
        return None


def set_by_launcher(variable: str) -> bool:
    """Whether the launcher gave an environment variable a value of its own, and not the user."""
    parent = launcher()
    if parent is None or variable not in os.environ:
        return False
    try:
        return os.environ[variable] != parent.environ().get(variable)
    except psutil.Error:
        return False


def launcher_was_given(flag: str) -> bool:
    """Whether the launcher's command line has a flag, spelt with underscores or hyphens."""
    parent = launcher()
    if parent is None:
        return False
    try:
        return flag.replace("-", "_") in [word.split("=")[0].replace("-", "_") for word in parent.cmdline()]
    except psutil.Error:
        return False
