"""The launcher that started this process, if one did: `accelerate launch` or `torchrun`.

Imports nothing slow, because train.py needs it before its own imports.
"""

import ctypes
import gc
import os
import re
import signal
import sys
import threading
import time

import psutil

from finetune.core.errors import UserError

_LAUNCHER = re.compile(r"(.*/)?(accelerate|accelerate-launch|torchrun)|accelerate\.commands\..*|torch\.distributed\..*")
_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 1.0
_UNTIL_PRINTED = 60.0  # seconds that the first process may import for longer than another
# Nobody sets these by hand: torch's elastic launcher does, and accelerate launch for a single process.
_MARKS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")


def prepare_for_imports() -> None:
    """Have Ctrl-C end the process without a traceback until `imports_done`, and the end of the launcher stop it.

    Garbage is not collected until then: the libraries' 900,000 objects would be searched many times while they are
    made, and at exit, which takes 2.3 of the 6 seconds of a process that only imports them.
    """
    gc.disable()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with_launcher()


def imports_done() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, so that data workers are ended and files closed, and collect garbage
    again, but for what was imported."""
    gc.freeze()
    gc.enable()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with_launcher() -> None:
    """Have this process get SIGTERM when its launcher is gone, however that ended: nothing trains on without it.

    On Linux the kernel sends it to a launcher's own child. Elsewhere, and where a shell script lies between the two, a
    thread watches. Without a launcher nothing is done: a process that `nohup` or a shell started stays.
    """
    started_by, parent = launcher(), os.getppid()
    if started_by is None:
        if _launcher_ended():
            print("error: launch: the launcher of this process ended before it started", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
    elif sys.platform == "linux" and started_by.pid == parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGTERM)
    else:
        threading.Thread(target=_watch, args=(started_by,), daemon=True).start()


def _watch(started_by: psutil.Process) -> None:
    while _runs(started_by):
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launcher_ended() -> bool:
    """Whether this process, which has no launcher, had one: its environment says so, and its parent's does not."""
    marks, parent = [mark for mark in _MARKS if mark in os.environ], os.getppid()
    if not marks or parent == 0:  # 0: outside of the container whose first process this is
        return False
    try:
        theirs = psutil.Process(parent).environ()
        return not any(mark in theirs for mark in marks)
    except psutil.Error:  # another user's: that of the init process, which takes orphans in
        return True


def launcher() -> psutil.Process | None:
    """The launcher that this process descends from, if any: its parent, unless a shell script lies between them."""
    try:
        process = psutil.Process(os.getppid())
        while process is not None and not any(map(_LAUNCHER.fullmatch, process.cmdline()[:6])):
            process = process.parent()
        return process
    except psutil.Error:
        return None


def launch_error(*problems: str) -> UserError:
    """What every process of a launch raises before they are connected; the first alone has the messages.

    A launcher ends all of them as soon as one has failed. So the others wait for that end, or the first, still busy
    with its imports, might never print its line.
    """
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal() or int(rank) == 0:
        return UserError(*problems)
    if launcher() is not None:
        time.sleep(_UNTIL_PRINTED)
    return UserError()


def restarts_left() -> bool:
    """Whether the launcher starts all processes again when one of them ends with an exit code other than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def end_launcher() -> None:
    """Ask the launcher to end, as a scheduler would."""
    started_by = launcher()
    if started_by is not None:
        started_by.send_signal(signal.SIGTERM)


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
