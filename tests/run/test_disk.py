"""A full disk, a quota or a read-only disk: one line, valid checkpoints, nothing half-written, and an exact resume."""

import shutil
import subprocess
from collections import namedtuple
from functools import partial

import pytest
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune.config.load import load_config
from finetune.models import hub
from finetune.models.load import load_kind
from finetune.run import checkpoint, manifest, report, start
from finetune.run import run as run_module
from harness.compare import differing, valid_checkpoints
from harness.configs import EVALUATED_STEPS
from harness.faults import at_call, draw_the_curve, fill_disk, limit_file_size
from harness.processes import finish, run

ADVICE = (
    "free some space or set another output_dir. Complete checkpoints are untouched; run the same command again to "
    "resume from the newest one"
)


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


def resumes(undisturbed, output_dir, *command):
    finish(*command, folder=undisturbed)
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []
    DDPMPipeline.from_pretrained(output_dir / "pipeline")


# Owner, name and call of the function before which the disk fills up; bytes left; the path in the message; the valid
# checkpoints. At step 0 two pictures are saved twice each, to a file and to TensorBoard: the fifth is of step 3.
FULL = {
    "the first checkpoint": ((checkpoint, "save", 1), 8192, "checkpoint-2", []),
    "a checkpoint's weights": ((checkpoint, "save", 2), 8192, "checkpoint-4", [2]),
    "its optimizer": ((checkpoint, "save", 2), 40960, "checkpoint-4", [2]),
    "its averaged weights": ((checkpoint, "save_file", 2), 4096, "checkpoint-4", [2]),
    "its manifest": ((manifest, "seal", 2), 0, "checkpoint-4", [2]),
    "the samples": ((Image.Image, "save", 5), 0, "samples/step-3.png", [2]),
    "the resolved config": ((start, "_open_report", 1), 0, "config.yaml", []),
    "the pipeline": ((hub, "save_export", 1), 8192, "pipeline", [4, 6]),
    "the loss curve": ((run_module, "loss_curve", 1), 4096, "loss_curve.png", [4, 6]),
}


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(("moment", "left", "named", "saved"), FULL.values(), ids=FULL.keys())
def test_a_full_disk_ends_the_run_with_one_line_and_it_resumes(undisturbed, disk, moment, left, named, saved):
    output_dir = disk / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")

    def before():
        draw_the_curve()
        at_call(*moment, partial(fill_disk, disk, left))

    failed = run(*command, folder=undisturbed, before=before)
    assert failed.returncode == 1
    assert failed.error.startswith(f"{output_dir / named}: cannot be written (")
    assert f"bytes are free there); {ADVICE}" in failed.error
    assert valid_checkpoints(output_dir) == saved
    (disk / "another-file").unlink()
    resumes(undisturbed, output_dir, *command)


QUOTA = {  # as above, but the limit is a file size: bytes, or the size at that moment of the files of a pattern
    "a checkpoint's weights": ((checkpoint, "save", 2), 8192, "checkpoint-4", [2]),
    "the metrics": ((report.History, "add", 4), "metrics.jsonl", "metrics.jsonl", [2]),
    "the curves": ((report.Report, "log", 4), "tensorboard/events*", "tensorboard", [2]),
    "the pictures in the curves": ((Image.Image, "save", 4), "tensorboard/events*", "tensorboard", []),
    "the pipeline": ((hub, "save_export", 1), 8192, "pipeline", [4, 6]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "size", "named", "saved"), QUOTA.values(), ids=QUOTA.keys())
def test_a_quota_ends_the_run_with_one_line_and_it_resumes(undisturbed, tmp_path, moment, size, named, saved):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")

    def act():
        limit_file_size(size if isinstance(size, int) else output_dir.glob(size))

    failed = run(*command, folder=undisturbed, before=partial(at_call, *moment, act))
    assert failed.returncode == 1
    assert failed.error.startswith(f"{output_dir / named}: cannot be written (")
    assert ADVICE in failed.error
    assert valid_checkpoints(output_dir) == saved
    resumes(undisturbed, output_dir, *command)


@pytest.mark.root
@pytest.mark.slow
def test_a_disk_that_becomes_read_only_in_a_run_or_before_it(undisturbed, disk):
    output_dir = disk / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")

    def cover():
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", output_dir], check=True)

    failed = run(*command, folder=undisturbed, before=partial(at_call, checkpoint, "save", 2, cover))
    assert failed.returncode == 1
    assert failed.error.startswith(f"{output_dir / 'checkpoint-4'}: cannot be written (Read-only file system, ")
    assert ADVICE in failed.error
    subprocess.run(["umount", output_dir], check=True)
    assert valid_checkpoints(output_dir) == [2]
    before = sorted(output_dir.rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused = run(*command, folder=undisturbed)
    assert refused.returncode == 2
    assert refused.error == (
        f"output_dir: {output_dir}: is not writable (Read-only file system); set a writable folder"
    )
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert sorted(output_dir.rglob("*")) == before
    resumes(undisturbed, output_dir, *command)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("file", "found the file {place}; expected a folder, or a name that is free"),
        ("file/run", "found the file {place.parent}; expected a folder, or a name that is free"),
        ("/proc/run", "found 0 bytes free, expected "),
        ("/dev/null", "found the file {place}; expected a folder, or a name that is free"),
    ],
)
def test_an_output_folder_that_cannot_exist(undisturbed, tmp_path, place, problem):
    """Found by a check as well, which writes nothing itself."""
    (tmp_path / "file").write_text("mine")
    for flags in ([], ["--check"]):
        command = "--config", undisturbed / "config.yaml", f"output_dir={tmp_path / place}", *flags
        refused = run(*command, folder=undisturbed)
        assert refused.returncode == 2
        path = tmp_path / place
        assert refused.error.startswith(f"output_dir: {path}: {problem.format(place=path)}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "tensorboard", "samples", "pipeline", "loss_curve.png"]
)
def test_a_file_where_a_folder_belongs_or_the_reverse(undisturbed, tmp_path, name):
    """It is named and left as it is; once it is moved away the run resumes."""
    output_dir = tmp_path / "run"
    mine = output_dir / name if "." not in name else output_dir / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    failed = run(*command, folder=undisturbed)
    assert failed.returncode == 1
    assert failed.error.startswith(f"{output_dir / name}")
    assert ": cannot be written (" in failed.error
    assert mine.read_text() == "mine"
    valid_checkpoints(output_dir)
    shutil.move(mine, tmp_path / "moved")
    if mine.parent != output_dir:
        mine.parent.rmdir()
    resumes(undisturbed, output_dir, *command)


@pytest.mark.slow
def test_a_run_starts_only_where_there_is_room_for_its_checkpoints_and_the_pipeline(undisturbed, tmp_path):
    """keep is 2, and the next one: 3 checkpoints, each of weights, two moments and the average; and the export."""
    tensors = load_file(undisturbed / "run/checkpoint-6/model.safetensors")
    weights = 4 * sum(tensor.numel() for tensor in tensors.values())  # bytes, in float32
    export = load_kind(load_config(undisturbed / "config.yaml", []).model, None, 0).export_bytes()
    disk = namedtuple("Disk", "total used free")
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")

    def start_with(free, *more):
        def before():
            shutil.disk_usage = lambda path: disk(free, 0, free)

        return run(*command, *more, folder=undisturbed, before=before)

    def needs(needed, *more):
        refused = start_with(needed - 1, *more)
        assert refused.returncode == 2
        assert refused.error.startswith(
            f"output_dir: {output_dir}: found {needed - 1:,} bytes free, expected {needed:,} for checkpoints of "
        )
        assert f" and an export of {export:,}; free some, " in refused.error

    needs(3 * 4 * weights + export)
    needs(3 * 3 * weights + export, "ema.enabled=false")
    needs(1 * 4 * weights + export, "checkpoint.every_steps=1000")  # only the last one
    needs(2 * 4 * weights + export, "checkpoint.keep=1")
    assert not output_dir.exists()
    assert start_with(12 * weights + export).returncode == 0
    # 2 exist, and the next one is saved before one is pruned
    needs(1 * 4 * weights + export, "training.num_epochs=4")
    assert start_with(4 * weights + export, "training.num_epochs=4").returncode == 0
