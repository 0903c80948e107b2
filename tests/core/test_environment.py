"""Variables of the launch that Accelerate and torch cannot read: a line each, and no traceback."""

import pytest

from finetune.core import groups
from finetune.core.environment import check_environment
from finetune.core.errors import UserError
from harness.configs import tiny_config, write_config, write_pictures
from harness.processes import run

NUMBER = "in the environment; expected a whole number: unset it, or start with torchrun or accelerate launch, which"
FLAG = "in the environment; expected true or false: unset it, or correct it"
DEVICE = "in the environment; expected a device that this machine has, such as cpu: unset it, or correct it"
TABLE = [
    ("WORLD_SIZE", "abc", NUMBER),
    ("WORLD_SIZE", "", NUMBER),
    ("RANK", "-", NUMBER),
    ("LOCAL_RANK", "0.5", NUMBER),
    ("MASTER_PORT", "http", NUMBER),
    ("OMPI_COMM_WORLD_SIZE", "two", NUMBER),
    ("TORCHELASTIC_MAX_RESTARTS", "x", NUMBER),
    ("ACCELERATE_USE_CPU", "maybe", FLAG),
    ("ACCELERATE_USE_FSDP", "", FLAG),
    ("ACCELERATE_TORCH_DEVICE", "nope", DEVICE),
    ("ACCELERATE_TORCH_DEVICE", "cpu:1", DEVICE),  # torch knows one, cpu:0
]


@pytest.mark.parametrize(("name", "value", "line"), TABLE)
def test_a_variable_that_cannot_be_read_is_named(monkeypatch, name, value, line):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_environment()
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name}: found {value!r} {line}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("LOCAL_RANK", "-1"), ("WORLD_SIZE", "1"), ("ACCELERATE_USE_CPU", "no"), ("ACCELERATE_TORCH_DEVICE", "cpu")],
)
def test_what_can_be_read_is_accepted(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0), ("x", 2)])
def test_the_first_process_alone_prints_it(monkeypatch, rank, lines):
    """Or each one, where nobody can tell which is the first."""
    monkeypatch.setenv("WORLD_SIZE", "two")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(UserError) as caught:
        check_environment()
    assert len(caught.value.problems) == lines


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    return write_config(base / "config.yaml", tiny_config(write_pictures(base / "pictures", 4), base / "run"))


@pytest.mark.parametrize(
    "left_over",
    [{"LOCAL_RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, {"PMI_SIZE": "2", "PMI_RANK": "0"}],
    ids=str,
)
def test_other_processes_that_cannot_be_reached_are_one_line(config, tmp_path, left_over):
    """As in a shell that has variables left over from another program, or of an MPI without an address."""
    outcome = run("--config", config, folder=tmp_path, ACCELERATE_USE_CPU="true", **left_over)
    assert outcome.returncode == 2
    assert outcome.error.startswith("launch: the environment names other processes, and not how to reach them (")
    assert "MASTER_ADDR" in outcome.error
    assert outcome.error.endswith("or none of them for one process: unset what is left over")


def test_a_wrong_variable_ends_the_run_before_anything_is_read(config, tmp_path):
    outcome = run("--config", config, folder=tmp_path, WORLD_SIZE="abc", ACCELERATE_USE_CPU="maybe")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert [line.split(":")[0] for line in outcome.errors] == ["WORLD_SIZE", "ACCELERATE_USE_CPU"]
    assert groups.control_group() is None
