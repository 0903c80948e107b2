"""Faults, injected where a test wants them: at the n-th call of a function something happens."""

import ctypes
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import torch
from diffusers import UNet2DModel
from PIL import Image

from finetune.evaluation.pictures import save_png
from finetune.run.loss_curve import loss_curve


def at_call(owner: object, name: str, call: int, act: Callable[[], None], after: bool = False) -> None:
    """Have something happen at the call-th call of a function, before it or after it."""
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


@contextmanager
def failing_at(owner: object, name: str, call: int, error: BaseException) -> Iterator[None]:
    """The call-th call of a function raises an error and does nothing else. Afterwards the function is as it was."""

    def fail() -> None:
        raise error

    with mock.patch.object(owner, name, getattr(owner, name)):
        at_call(owner, name, call, fail)
        yield


def signal_self(*numbers: int) -> None:
    """This process gets these signals."""
    for number in numbers:
        os.kill(os.getpid(), number)


def signal_at(number: int, owner: object, name: str, call: int, after: bool = False) -> None:
    """This process gets a signal at the call-th call of a function; SIGKILL ends it there."""
    at_call(owner, name, call, lambda: signal_self(number), after)


def kill_at(owner: object, name: str, call: int, after: bool = False) -> None:
    """This process is killed at the call-th call of a function."""
    signal_at(signal.SIGKILL, owner, name, call, after)


class RequestedAt:
    """For a StopCheck: a stop is requested from the count-th time on that it is asked for."""

    def __init__(self, count: int):
        self.count, self.asked = count, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked >= self.count


def stop_after_updates(count: int) -> None:
    """The run in this process is told to stop in its count-th update, as by a signal (with no evaluations due)."""
    from finetune.core.stopping import StopRequest

    requested = RequestedAt(count)
    StopRequest.requested = lambda self: requested()


def skip_the_export() -> None:
    """Runs in this process end with their last checkpoint, without pipeline and loss curve."""
    from finetune.models import hub
    from finetune.run import run

    hub.save_export = run.loss_curve = lambda *arguments: None


def leave_out_the_curve() -> None:
    """Runs in this process end with a picture of one pixel for a loss curve, whose drawing takes as long as the
    training of a tiny network."""
    from finetune.run import run

    run.loss_curve = lambda history, file, steps_per_epoch: save_png(Image.new("L", (1, 1)), file)


def draw_the_curve() -> None:
    """Runs in this process end with their loss curve."""
    from finetune.run import run

    run.loss_curve = loss_curve


def exhaust_memory(*_: object) -> None:
    """torch's own out-of-memory error: nobody has a pebibyte."""
    torch.empty(2**50, dtype=torch.uint8)


def limit_images(too_many: Callable[[int], bool], where: str = "forward") -> None:
    """From here on the network runs out of memory with as many images as `too_many` says, `forward` or `backward`."""
    _limit(lambda images: too_many(len(images)), where)


def limit_pixels(most: int) -> None:
    """From here on the network runs out of memory with more pixels than these in all images of a pass."""
    _limit(lambda images: images[:, 0].numel() > most, "forward")


def _limit(too_much: Callable[[torch.Tensor], bool], where: str) -> None:
    forward = UNet2DModel.forward

    def limited(self, images, *rest, **keywords):
        fails = too_much(images)
        if fails and where == "forward":
            exhaust_memory()
        output = forward(self, images, *rest, **keywords)
        if fails and where == "backward" and output.sample.requires_grad:
            output.sample.register_hook(exhaust_memory)
        return output

    UNet2DModel.forward = limited


def kill_a_worker() -> None:
    """A data worker of this process is killed, and the process waits until it is told (torch raises in the wait)."""
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(30)


def wait_for_pruning() -> None:
    """Wait for the threads that delete pruned checkpoints while training goes on."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()


def fill_disk(disk: Path, left: int) -> None:
    """Another file takes the free space of a disk, except for some bytes."""
    wait_for_pruning()
    free = shutil.disk_usage(disk).free
    (disk / "another-file").write_bytes(bytes(max(free - left, 0)))


def limit_file_size(size: int | Iterable[Path]) -> None:
    """From here on writes fail (EFBIG, like a quota) beyond this size, or beyond the largest of these files."""
    if not isinstance(size, int):
        size = max(file.stat().st_size for file in size)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def limit_shared_memory(size: str) -> None:
    """This process and its workers get a /dev/shm of this size. Needs root."""
    mount_own("/dev/shm", f"size={size}")


def mount_own(folder: str | Path, options: str = "") -> None:
    """This process and its children see an empty folder of their own there, in memory. Needs root."""
    clone_newns, ms_private, ms_rec = 0x00020000, 1 << 18, 1 << 14
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(clone_newns) == 0
    assert libc.mount(b"none", b"/", None, ms_rec | ms_private, None) == 0
    assert libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()) == 0


def cut_the_network() -> None:
    """No host name can be resolved, and waiting between attempts takes no time."""

    def unknown(*arguments, **keywords):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False  # the tests set it
    socket.getaddrinfo, time.sleep = unknown, lambda seconds: None  # five attempts would take half a minute
