"""The README is true: its commands run, its table of keys is the schema."""

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml

from finetune.config import Config, load_config
from tiny import ROOT, write_config

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
ELSEWHERE = {  # by .ci/run, which calls this, and by test_train.py's main job
    "pip install -r requirements.txt",
    "pip install -r tests/requirements.txt && pytest",
    "accelerate launch --config_file accelerate_config.yaml train.py --config configs/digits.yaml",
}
HERE = {
    "python train.py --config configs/digits.yaml --check": "Memory: ",
    "accelerate launch train.py --config configs/digits.yaml output_dir=runs/try training.max_train_steps=20": "Finish",
}
TENSORBOARD = "tensorboard --logdir runs/digits"


def test_every_command_is_run_somewhere():
    assert {*COMMANDS} == ELSEWHERE | {*HERE, TENSORBOARD}
    ci = (ROOT / ".ci/run").read_text()
    assert "pip install" in ci
    assert "pytest" in ci


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "tests")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def in_shell(command, checkout):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return {"args": command, "shell": True, "cwd": checkout, "env": {**os.environ, "PATH": path}}


@pytest.mark.parametrize("command", HERE)
def test_a_command(command, checkout):
    outcome = subprocess.run(**in_shell(command, checkout), capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert HERE[command] in outcome.stdout


def test_two_processes_on_a_cpu(checkout):
    row = next(line for line in README.splitlines() if "two processes on a CPU" in line)
    command = re.search(r"`(.*)`", row)[1] + " output_dir=runs/two training.max_train_steps=2 samples.count=0"
    outcome = subprocess.run(**in_shell(command, checkout), capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert "cpu, 2 process(es)" in outcome.stdout


def test_the_board_shows_a_run(checkout):
    board = subprocess.Popen(**in_shell(f"exec {TENSORBOARD} --port 6131", checkout), stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            time.sleep(0.5)
            try:
                page = urllib.request.urlopen("http://localhost:6131/", timeout=5).read()
                break
            except OSError:
                continue
        assert b"TensorBoard" in page
    finally:
        board.kill()
        board.wait()


def test_the_table_has_every_key_with_its_default():
    rows = [row.split("|")[1:3] for row in README.split("## Config\n")[1].splitlines() if row.startswith("| `")]
    told = {}
    for keys, defaults in rows:
        names = re.findall(r"`(.*?)`", keys)
        section = names[0].rpartition(".")[0]
        names = [section + name if name.startswith(".") else name for name in names]
        values = yaml.safe_load(f"[{defaults}]") or ["not told"] * len(names)
        told |= dict(zip(names, values, strict=True))
    schema = {}
    for name, field in Config.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        schema |= {f"{name}.{key}": inner.default for key, inner in keys.items()} if keys else {name: field.default}
    assert told.keys() | {"optimizer.name"} == schema.keys()  # it has one name, which the row of its other keys says
    for key, value in told.items():
        default = list(schema[key]) if isinstance(schema[key], tuple) else schema[key]
        if value != "not told":
            assert (float(value) if isinstance(default, float) else value) == default, key
        else:
            assert schema[key] is None or "Undefined" in repr(schema[key]), key


def test_its_own_config_is_one(tmp_path):
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "runs/mine" in block)
    config = load_config(write_config(tmp_path / "mine.yaml", yaml.safe_load(text.replace("1e-5", "1.0e-5"))))
    assert config.training.micro_batch_size == "auto"
