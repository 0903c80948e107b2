"""A run that is killed at any point resumes with the same command and ends bit-identical to an undisturbed run."""

import signal
from functools import partial
from pathlib import Path

import pytest
from diffusers import DDPMPipeline
from PIL import Image

from finetune.evaluation import validation
from finetune.evaluation.sampling import ImageSampler
from finetune.models import hub
from finetune.run import checkpoint, checkpoints, manifest, report, run
from finetune.training.window import Window
from harness.compare import differing, valid_checkpoints
from harness.configs import EVALUATED_STEPS
from harness.faults import kill_at
from harness.processes import finish
from harness.processes import run as run_script

KILLS = {  # owner, name and call of the function at which the process is killed; True: after it
    "between an update and its checkpoint": (run.Run, "save", 2),
    "before the renaming": (Path, "rename", 2),
    "in a later validation": (validation.Validation, "losses", 4),
}
SLOW_KILLS = {
    "before the first update": (Window, "add", 1),
    "inside a window": (Window, "add", 8),
    "weights half saved": (checkpoint, "save_file", 2),
    "before the manifest": (manifest, "seal", 2),
    "after the manifest": (manifest, "seal", 2, True),
    "after the renaming": (Path, "rename", 2, True),
    "before pruning": (checkpoints.Checkpoints, "prune", 3),
    "while pruning": (checkpoints.shutil, "rmtree", 1),
    "in the first validation": (validation.Validation, "losses", 1, True),
    "while sampling": (ImageSampler, "sample", 2, True),
    "before a picture is written": (Image.Image, "save", 5),  # a file and TensorBoard's copy of two pictures at step 0
    "after a line of metrics": (report.History, "add", 5, True),
    "before the loss curve": (run, "loss_curve", 1),
    "before the export": (hub, "save_export", 1),
    "while exporting": (DDPMPipeline, "save_pretrained", 1, True),
    "after the export": (hub, "save_export", 1, True),
}
MOMENTS = [
    *(pytest.param(kill, id=name) for name, kill in KILLS.items()),
    *(pytest.param(kill, id=name, marks=pytest.mark.slow) for name, kill in SLOW_KILLS.items()),
]


@pytest.mark.parametrize("kill", MOMENTS)
def test_a_killed_run_resumes_bit_identically(undisturbed, tmp_path, kill):
    output_dir = tmp_path / "run"
    arguments = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    killed = run_script(*arguments, folder=tmp_path, before=partial(kill_at, *kill))
    assert killed.returncode == -signal.SIGKILL
    assert all(checkpoint.flaw(folder) is None for folder in output_dir.glob("checkpoint-*"))
    finish(*arguments, folder=tmp_path)
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []
    assert valid_checkpoints(output_dir) == [4, 6]
    names = [{path.name for path in folder.iterdir()} for folder in (undisturbed / "run", output_dir)]
    assert names[0] == names[1]
    DDPMPipeline.from_pretrained(output_dir / "pipeline")
