"""The hub, the data, the workers or the shared memory fail: one line, and the same command goes on."""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from functools import partial

import datasets
import huggingface_hub
import pytest
import torch
from scripted import at_call, nothing
from trouble import said, script, two, whole

import train
from tiny import differing, stop_after_updates, tiny_config, write_config, write_pictures

STEPS = 6
AGAIN = "set data.num_workers=0 or free some, and run the same command again"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it that was not disturbed."""
    base = tmp_path_factory.mktemp("base")
    config = tiny_config(
        write_pictures(base / "pictures", 19),
        base / "run",
        checkpoint={"every_steps": 2},
        logging={"tracker": "tensorboard"},
    )
    write_config(base / "config.yaml", config)
    assert script("--config", base / "config.yaml", folder=base).returncode == 0
    return base


def goes_on(base, run, *arguments):
    again = script(*arguments, folder=base)
    assert again.returncode == 0, again.stderr
    assert differing(base / "run", run, STEPS) == []


def no_network():
    """As without what the tests' environment says of the hub, on a machine that knows no other."""

    def unknown(*arguments, **keywords):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    socket.getaddrinfo, time.sleep = unknown, lambda seconds: None  # five attempts take half a minute


@pytest.mark.parametrize("before", [nothing, no_network], ids=["offline", "no network"])
@pytest.mark.parametrize(("key", "more"), [("model.pretrained", ("model.unet=null",)), ("data.source", ())])
def test_the_hub_out_of_reach(base, tmp_path, before, key, more):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", f"{key}=somebody/digits", *more)
    line = said(script(*arguments, folder=tmp_path, before=before), 2)
    assert line.startswith(f"{key}: ")
    assert "somebody/digits" in line
    assert re.search(
        r"the hub (cannot be reached|did not give it) \(.*check the (name and the network|connection)", line
    )
    assert not (tmp_path / "run").exists()


def test_the_data_gone_and_back(base, tmp_path):
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(base / "pictures", pictures)
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", f"data.source={pictures}")
    stopped = script(*arguments, folder=tmp_path, before=partial(stop_after_updates, 3))
    assert "Stopped after step 3 of 6" in stopped.stdout
    pictures.rename(tmp_path / "elsewhere")
    line = said(script(*arguments, folder=tmp_path), 2)
    assert line.startswith(f"data.source: found nothing at {pictures}; expected digits, a folder of pictures")
    (tmp_path / "elsewhere").rename(pictures)
    (pictures / "0007.png").rename(tmp_path / "0007.png")
    other = script(*arguments, folder=tmp_path)
    assert other.returncode == 2
    assert other.errors[0].startswith(f"error: {run}/checkpoint-3 is of another run: data.fingerprint: ")
    (tmp_path / "0007.png").rename(pictures / "0007.png")
    assert whole(run) == [2, 3]
    goes_on(base, run, *arguments)


def test_workers_end_with_the_run(base, tmp_path):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "data.num_workers=2")

    def before():
        # Seconds that torch gives each worker that was not told; the test gives fewer to all.
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 600
        stop_after_updates(3)

    stopped = script(*arguments, folder=tmp_path, before=before)
    assert stopped.returncode == 143, stopped.stderr
    goes_on(base, tmp_path / "run", *arguments)


def kill_a_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


@pytest.mark.parametrize("call", [1, 8])  # of Window.add, 2 an update of 8 images: in the first one, in the fourth
def test_a_killed_worker(base, tmp_path, call):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "data.num_workers=2")
    before = partial(at_call, train.Window, "add", call, kill_a_worker)
    line = said(script(*arguments, folder=tmp_path, before=before), 1)
    assert line == f"data.num_workers: a data worker was killed, most likely for want of memory; {AGAIN}"
    assert whole(run) in ([[]] if call == 1 else [[2], [2, 4]])  # its end is noticed before or after the save
    goes_on(base, run, *arguments)


def test_a_killed_worker_of_one_of_two_processes(base, tmp_path):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "data.num_workers=1")
    arguments += ("training.gradient_accumulation_steps=1",)

    def before(process):
        if process == 1:
            at_call(train.Window, "add", 4, kill_a_worker)

    one, other = (each.wait() for each in two(*arguments, folder=tmp_path, before=before))
    assert said(other, 1).startswith("data.num_workers: a data worker was killed")
    assert said(one, 1).startswith("launch: another process of this run ended")
    assert all(step in (2, 4) for step in whole(run))
    assert {each.wait().returncode for each in two(*arguments, folder=tmp_path)} == {0}
    assert whole(run) == [2, 4, 6]


def small_shared_memory(size):
    """Of this process and its workers alone."""
    clone_newns, ms_private, ms_rec = 0x00020000, 1 << 18, 1 << 14
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(clone_newns) == 0
    assert libc.mount(b"none", b"/", None, ms_rec | ms_private, None) == 0
    assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a /dev/shm of a test's own")
@pytest.mark.parametrize("size", ["4k", "64k"])  # no room for the queues, none for batches
def test_a_full_shared_memory(base, tmp_path, size):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}", "data.num_workers=2")
    line = said(script(*arguments, folder=tmp_path, before=partial(small_shared_memory, size)), 1)
    assert line == f"data.num_workers: found no room in shared memory (/dev/shm) for its batches; {AGAIN}"
    assert whole(run) == []
    goes_on(base, run, *arguments)
    shutil.rmtree(run)
    alone = script(*arguments, "data.num_workers=0", folder=tmp_path, before=partial(small_shared_memory, size))
    assert alone.returncode == 0, alone.stderr
