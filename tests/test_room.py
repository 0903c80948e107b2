"""No room, at any moment: one line, every checkpoint whole, no rubbish, and the same command goes on to the bit."""

import os
import resource
import shutil
import signal
import subprocess
from collections import namedtuple
from functools import partial

import pytest
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from scripted import at_call
from test_checkpoint import removed
from trouble import said, script, whole

from finetune import checkpoint, folder, manifest, model, pictures, report
from finetune.run import Run
from test_kill import STEPS, full_config
from tiny import differing, write_config, write_pictures

ADVICE = "make room, or give another output_dir. Whole checkpoints are as they were, and the same command goes on"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it with all the room it wants."""
    base = tmp_path_factory.mktemp("base")
    write_config(base / "config.yaml", full_config(write_pictures(base / "pictures", 19), base / "run"))
    done = script("--config", base / "config.yaml", folder=base)
    assert done.returncode == 0, done.stderr
    return base


@pytest.fixture
def disk(tmp_path):
    """A disk of four megabytes: three times what the run takes at its largest."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-R", disk], check=True)


def fill(disk, left):
    """Somebody else takes what is free, but for some bytes."""
    removed()
    free = shutil.disk_usage(disk).free
    with open(disk / "somebody-elses", "wb") as file:
        file.write(bytes(max(free - left, 0)))


# Owner, name and call of the function before which there is no more room; bytes left; what is named; what is whole.
FULL = {
    "the first checkpoint": ((checkpoint, "save", 1), 8192, "checkpoint-2", []),
    "a checkpoint's weights": ((checkpoint, "save", 2), 8192, "checkpoint-4", [2]),
    "its optimizer": ((checkpoint, "save", 2), 40960, "checkpoint-4", [2]),
    "its averaged weights": ((checkpoint, "save_file", 2), 4096, "checkpoint-4", [2]),
    "its manifest": ((manifest, "seal", 2), 0, "checkpoint-4", [2]),
    "the samples": ((report, "save_png", 3), 0, "samples/step-3.png", [2]),
    "the resolved config": ((Run, "_open_report", 1), 0, "config.yaml", []),
    "the pipeline": ((model, "save_pipeline", 1), 8192, "pipeline", [4, 6]),
    "the loss curve": ((pictures, "loss_curve", 1), 4096, "loss_curve.png", [4, 6]),
}


@pytest.mark.parametrize(("moment", "left", "named", "saved"), FULL.values(), ids=FULL.keys())
def test_a_full_disk(base, disk, moment, left, named, saved):
    run = disk / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}")
    line = said(script(*arguments, folder=base, before=partial(at_call, *moment, partial(fill, disk, left))), 1)
    assert line.startswith(f"{run / named}: cannot be written (")
    assert "bytes are free there); " + ADVICE in line
    assert whole(run) == saved
    (disk / "somebody-elses").unlink()
    again = script(*arguments, folder=base)
    assert again.returncode == 0, again.stderr
    assert differing(base / "run", run, STEPS) == []
    DDPMPipeline.from_pretrained(run / "pipeline")


def no_file_above(size):
    """A quota: from here on a write fails (EFBIG) that makes a file larger than this, or than one is already."""
    size = size if isinstance(size, int) else max(file.stat().st_size for file in size)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


QUOTA = {  # for the curves and the metrics: the size they have at that moment
    "a checkpoint's weights": ((checkpoint, "save", 2), 8192, "checkpoint-4", [2]),
    "the metrics": ((report.History, "add", 4), "metrics.jsonl", "metrics.jsonl", [2]),
    "the curves": ((report.Report, "log", 4), "tensorboard/events*", "tensorboard", [2]),
    "the pictures in the curves": ((report, "save_png", 2), "tensorboard/events*", "tensorboard", []),
    "the pipeline": ((model, "save_pipeline", 1), 8192, "pipeline", [4, 6]),
}


@pytest.mark.parametrize(("moment", "size", "named", "saved"), QUOTA.values(), ids=QUOTA.keys())
def test_a_quota(base, tmp_path, moment, size, named, saved):
    run = tmp_path / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}")

    def act():
        no_file_above(size if isinstance(size, int) else run.glob(size))

    line = said(script(*arguments, folder=base, before=partial(at_call, *moment, act)), 1)
    assert line.startswith(f"{run / named}: cannot be written (")
    assert ADVICE in line
    assert whole(run) == saved
    again = script(*arguments, folder=base)
    assert again.returncode == 0, again.stderr
    assert differing(base / "run", run, STEPS) == []


def test_a_disk_that_becomes_read_only(base, disk):
    """In the middle of a run, as after an error of the disk; and at a start."""
    run = disk / "run"
    arguments = ("--config", base / "config.yaml", f"output_dir={run}")

    def cover():
        os.system(f"mount -t tmpfs -o ro tmpfs {run}")

    line = said(script(*arguments, folder=base, before=partial(at_call, checkpoint, "save", 2, cover)), 1)
    assert line.startswith(f"{run / 'checkpoint-4'}: cannot be written (Read-only file system, ")
    assert ADVICE in line
    subprocess.run(["umount", run], check=True)
    assert whole(run) == [2]
    before = sorted(run.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    line = said(script(*arguments, folder=base), 2)
    assert line == f"output_dir: {run}: cannot be written (Read-only file system); give a folder that can"
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert sorted(run.rglob("*")) == before
    assert script(*arguments, folder=base).returncode == 0
    assert differing(base / "run", run, STEPS) == []


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "cannot be written (File exists); give a folder that can"),
        ("file/run", "cannot be written (Not a directory); give a folder that can"),
        ("/proc/run", "found 0 bytes free, expected "),
        ("/dev/null", "cannot be written (File exists); give a folder that can"),
    ],
)
def test_an_output_folder_that_cannot_be(base, tmp_path, place, words):
    (tmp_path / "file").write_text("mine")
    line = said(script("--config", base / "config.yaml", f"output_dir={tmp_path / place}", folder=base), 2)
    assert line.startswith(f"output_dir: {tmp_path / place}: {words}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


@pytest.mark.parametrize("name", ["config.yaml", "tensorboard", "samples", "pipeline", "loss_curve.png"])
def test_what_stands_where_a_run_writes(base, tmp_path, name):
    """A file where a folder belongs, or a folder where a file does, and something in it."""
    run = tmp_path / "run"
    mine = run / name if "." not in name else run / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    arguments = ("--config", base / "config.yaml", f"output_dir={run}")
    line = said(script(*arguments, folder=base), 1)
    assert line.startswith(f"{run / name}")
    assert ": cannot be written (" in line
    assert mine.read_text() == "mine"
    whole(run)
    shutil.move(mine, tmp_path / "moved")
    if mine.parent != run:
        mine.parent.rmdir()
    assert script(*arguments, folder=base).returncode == 0
    assert differing(base / "run", run, STEPS) == []


def test_what_is_free_is_compared_with_what_is_needed(base, tmp_path, monkeypatch):
    """keep 2 and the next one: 3 checkpoints, each of weights, two moments and the average; and the pipeline."""
    tensors = load_file(base / "run/checkpoint-6/model.safetensors")
    weights = 4 * sum(tensor.numel() for tensor in tensors.values())  # bytes, in float32
    disk = namedtuple("Disk", "total used free")
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")

    def found(free, *more):
        monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: disk(free, 0, free))
        return script(*arguments, *more, folder=base)

    def refused(needed, *more):
        line = said(found(needed - 1, *more), 2)
        assert line.startswith(f"output_dir: {tmp_path / 'run'}: found {needed - 1:,} bytes free, expected {needed:,} ")

    refused((3 * 4 + 1) * weights)
    refused((3 * 3 + 1) * weights, "ema.enabled=false")
    refused((1 * 4 + 1) * weights, "checkpoint.every_steps=1000")  # only the last one
    refused((2 * 4 + 1) * weights, "checkpoint.keep=1")
    assert not (tmp_path / "run").exists()
    assert found(13 * weights).returncode == 0
    refused((1 * 4 + 1) * weights, "training.num_epochs=4")  # 2 are there, and the next one comes before one goes
    assert found(5 * weights, "training.num_epochs=4").returncode == 0
