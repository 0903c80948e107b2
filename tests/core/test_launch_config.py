"""Accelerate's config file, read by a process that no launcher started as `accelerate launch` would."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from finetune.core import launch_config
from finetune.core.errors import UserError
from finetune.core.launch_config import take_launch_config
from harness.configs import ROOT

SINGLE = ("one-gpu-bf16", "several-gpus", "several-machines")
CONFIG = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1}


@pytest.fixture
def environment(monkeypatch):
    """The process's environment, without what a launcher sets; restored afterwards."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WORLD", "RANK"))}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def write(folder, **changes):
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(CONFIG | changes))
    return str(file)


PRINTED = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16", "use_cpu": True},
        {
            "mixed_precision": "no",
            "gpu_ids": "1",
            "dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"},
        },
    ],
    ids=["bf16 on the cpu", "compiled on the second GPU"],
)
def test_it_sets_what_accelerate_launch_sets_for_its_process(tmp_path, environment, changes):
    file = write(tmp_path, **changes)
    script = tmp_path / "script.py"
    script.write_text(PRINTED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, script]
    launched = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    before = dict(environment)
    environment["ACCELERATE_CONFIG_FILE"] = file
    take_launch_config()
    added = {name: value for name, value in environment.items() if before.get(name) != value}
    del added["ACCELERATE_CONFIG_FILE"]
    threads = ("OMP_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME")
    expected = {name: value for name, value in launched.items() if before.get(name) != value and name not in threads}
    assert added == expected
    assert expected["ACCELERATE_MIXED_PRECISION"] == changes["mixed_precision"]


def test_the_file_that_accelerate_config_wrote_is_taken_where_none_is_named(tmp_path, environment, monkeypatch):
    monkeypatch.setattr(launch_config, "default_config_file", str(tmp_path / "accelerate.yaml"))
    take_launch_config()
    assert "ACCELERATE_MIXED_PRECISION" not in environment
    write(tmp_path, mixed_precision="bf16")
    take_launch_config()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_torchruns_processes_take_a_file_that_is_named_alone(tmp_path, environment, monkeypatch):
    monkeypatch.setattr(launch_config, "default_config_file", write(tmp_path, mixed_precision="bf16"))
    environment["WORLD_SIZE"] = "2"
    take_launch_config()
    assert "ACCELERATE_MIXED_PRECISION" not in environment
    environment["ACCELERATE_CONFIG_FILE"] = write(tmp_path, mixed_precision="bf16", num_processes=2)
    take_launch_config()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_variables_that_are_set_already_count(tmp_path, environment):
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "3"}
    environment["ACCELERATE_CONFIG_FILE"] = write(tmp_path, mixed_precision="bf16", gpu_ids="0")
    take_launch_config()
    assert (environment["ACCELERATE_MIXED_PRECISION"], environment["CUDA_VISIBLE_DEVICES"]) == ("no", "3")


def test_under_accelerate_launch_nothing_is_taken_and_a_file_that_it_ignored_is_refused(
    tmp_path, environment, monkeypatch
):
    monkeypatch.setattr(launch_config, "default_config_file", write(tmp_path, mixed_precision="bf16"))
    environment |= {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_MIXED_PRECISION": "no"}
    take_launch_config()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    environment["ACCELERATE_CONFIG_FILE"] = "some.yaml"
    with pytest.raises(UserError, match=r"^ACCELERATE_CONFIG_FILE: found some\.yaml, which accelerate launch does not"):
        take_launch_config()


@pytest.mark.parametrize("name", SINGLE)
def test_the_shipped_files_are_taken_and_more_processes_than_one_are_noted(environment, capsys, name):
    file = ROOT / f"configs/accelerate/{name}.yaml"
    environment["ACCELERATE_CONFIG_FILE"] = str(file)
    asked = yaml.safe_load(file.read_text())["num_processes"]
    note = f"launch: {file} sets num_processes: {asked}, but this is 1 process; accelerate launch starts {asked}.\n"
    take_launch_config()
    assert capsys.readouterr().out == (note if asked > 1 else "")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize(
    ("kind", "variable"),
    [("FSDP", "ACCELERATE_USE_FSDP"), ("MEGATRON_LM", "ACCELERATE_USE_MEGATRON_LM")],
)
def test_a_file_that_spreads_the_model_is_not_read_as_one_that_does_not(tmp_path, environment, kind, variable):
    environment["ACCELERATE_CONFIG_FILE"] = write(tmp_path, distributed_type=kind)
    take_launch_config()
    assert environment[variable] == "true"


@pytest.mark.parametrize(
    "text",
    [None, "", "a: [", "- 1", "distributed_type: 'NO'\nnum_process: 1\n", "mixed_precision: bf16\n", "\0"],
    ids=["missing", "empty", "no YAML", "a list", "unknown key", "no type", "binary"],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, environment, text):
    file = tmp_path / "accelerate.yaml"
    if text is not None:
        file.write_text(text)
    environment["ACCELERATE_CONFIG_FILE"] = str(file)
    with pytest.raises(UserError) as refused:
        take_launch_config()
    (problem,) = refused.value.problems
    assert problem.startswith(f"launch: {file}: cannot be used (")
    assert problem.endswith("as accelerate config writes one; ACCELERATE_CONFIG_FILE names another")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mixed_precision": False}, "mixed_precision is false, as YAML reads the word no without quotes: write 'no'"),
        (
            {"distributed_type": False},
            "distributed_type is false, as YAML reads the word no without quotes: write 'no'",
        ),
        ({"num_processes": "two"}, "num_processes is 'two', not a whole number"),
        ({"num_processes": True}, "num_processes is True, not a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, environment, changes, reason):
    environment["ACCELERATE_CONFIG_FILE"] = file = write(tmp_path, **changes)
    with pytest.raises(UserError) as refused:
        take_launch_config()
    assert refused.value.problems[0].startswith(f"launch: {file}: cannot be used ({reason}); expected a config file")


def test_a_number_of_processes_that_is_left_open_is_one(tmp_path, environment, capsys):
    environment["ACCELERATE_CONFIG_FILE"] = write(tmp_path, num_processes=None, mixed_precision="bf16")
    take_launch_config()
    assert (environment["ACCELERATE_MIXED_PRECISION"], capsys.readouterr().out) == ("bf16", "")
