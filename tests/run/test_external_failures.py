"""The hub, the data, the workers or the shared memory fail: one line, and the same command resumes."""

import os
import shutil
import signal
from functools import partial

import pytest
import torch

from finetune.run import manifest
from finetune.training.window import Window
from harness.compare import differing, valid_checkpoints
from harness.configs import EVALUATED_STEPS
from harness.faults import at_call, cut_the_network, kill_a_worker, limit_shared_memory, signal_at
from harness.processes import finish, nothing, run, run_two

AGAIN = "set data.num_workers=0 or free some memory, and run the same command again"


def resumes(undisturbed, output_dir, *command):
    finish(*command, folder=undisturbed)
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []


@pytest.mark.parametrize("before", [nothing, cut_the_network], ids=["offline", "no network"])
@pytest.mark.parametrize(("key", "more"), [("model.pretrained", ("model.unet=null",)), ("data.source", ())])
def test_a_hub_that_cannot_be_reached_is_one_line(undisturbed, tmp_path, before, key, more):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", f"{key}=somebody/digits", *more)
    refused = run(*command, folder=tmp_path, before=before)
    assert refused.returncode == 2
    assert refused.error.startswith(f"{key}: ")
    assert "somebody/digits" in refused.error
    assert "the hub cannot be reached" in refused.error
    assert "check the" in refused.error
    assert not output_dir.exists()


def test_a_run_whose_data_are_gone_or_changed_waits_for_them(undisturbed, tmp_path):
    output_dir, pictures = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(undisturbed / "pictures", pictures)
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", f"data.source={pictures}")
    stopped = run(*command, folder=tmp_path, before=partial(signal_at, signal.SIGTERM, Window, "add", 5))
    assert "Stopped after step 3 of 6" in stopped.stdout
    pictures.rename(tmp_path / "elsewhere")
    refused = run(*command, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.error.startswith(f"data.source: found nothing at {pictures}; expected digits, a folder of pictures")
    (tmp_path / "elsewhere").rename(pictures)
    (pictures / "0007.png").rename(tmp_path / "0007.png")
    refused = run(*command, folder=tmp_path)
    assert refused.returncode == 2
    assert refused.errors[0].startswith(f"{output_dir}/checkpoint-3 is of another run: data.fingerprint: ")
    (tmp_path / "0007.png").rename(pictures / "0007.png")
    assert valid_checkpoints(output_dir) == [2, 3]
    resumes(undisturbed, output_dir, *command)


def test_workers_end_with_the_run(undisturbed, tmp_path):
    """A worker that is not told to end is waited for: five seconds in torch, ten minutes here."""
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", "data.num_workers=2")

    def before():
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 600
        signal_at(signal.SIGTERM, Window, "add", 5)

    stopped = run(*command, folder=tmp_path, before=before)
    assert stopped.returncode == 143, stopped.stderr
    resumes(undisturbed, output_dir, *command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        ((Window, "add", 1), []),
        ((Window, "add", 7), [2]),
        ((manifest, "seal", 2), [2]),
    ],  # windows of 8 + 8 + 1 images in 4s: 2 + 2 + 1 calls
    ids=["first update", "fourth update", "second save"],
)
def test_a_killed_worker_is_one_line_and_the_run_resumes(undisturbed, tmp_path, moment, saved):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", "data.num_workers=2")
    failed = run(*command, folder=tmp_path, before=partial(at_call, *moment, kill_a_worker))
    assert failed.returncode == 1
    assert failed.error == f"data.num_workers: a data worker was killed, most likely because memory ran out; {AGAIN}"
    assert valid_checkpoints(output_dir) == saved
    resumes(undisturbed, output_dir, *command)


@pytest.mark.slow
def test_a_killed_worker_of_one_of_two_processes(undisturbed, tmp_path):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", "data.num_workers=1")
    command += ("training.gradient_accumulation_steps=1",)

    def before(process):
        if process == 1:
            at_call(Window, "add", 4, kill_a_worker)

    one, other = run_two(*command, folder=tmp_path, before=before)
    assert (one.returncode, other.returncode) == (1, 1)
    assert other.error.startswith("data.num_workers: a data worker was killed")
    assert one.error.startswith("launch: another process of this run ended")
    assert valid_checkpoints(output_dir) == [2]
    assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
    assert valid_checkpoints(output_dir) == [4, 6]


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount another /dev/shm")
@pytest.mark.parametrize("size", ["4k", "64k"])  # no room for the queues, none for batches
def test_a_full_shared_memory_is_one_line_and_no_workers_need_none(undisturbed, tmp_path, size):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", "data.num_workers=2")
    failed = run(*command, folder=tmp_path, before=partial(limit_shared_memory, size))
    assert failed.returncode == 1
    assert failed.error == f"data.num_workers: shared memory (/dev/shm) has no room for its batches; {AGAIN}"
    assert valid_checkpoints(output_dir) == []
    resumes(undisturbed, output_dir, *command, "data.num_workers=0")
