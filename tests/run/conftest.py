"""An undisturbed run, which the tests that stop, kill or starve one compare with; checkpoints without a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from finetune.run import checkpoint
from harness.configs import evaluated_config, write_config, write_pictures
from harness.processes import finish, run_two


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `config.yaml` of an evaluated run, its `pictures`, and the finished `run`."""
    base = tmp_path_factory.mktemp("undisturbed")
    write_config(base / "config.yaml", evaluated_config(write_pictures(base / "pictures", 19), base / "run"))
    finish("--config", base / "config.yaml", folder=base)
    return base


@pytest.fixture(scope="session")
def on_two(undisturbed: Path) -> tuple[str | Path, ...]:
    """The undisturbed run on two processes of one host, in two/; returns the command, which lacks the output folder."""
    command = ("--config", undisturbed / "config.yaml", "training.micro_batch_size=2")
    outcomes = run_two(*command, f"output_dir={undisturbed / 'two'}", folder=undisturbed)
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    return command


@pytest.fixture
def accelerator() -> Accelerator:
    """With a network of two by three weights and its AdamW."""
    accelerator = Accelerator(cpu=True)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    accelerator.prepare(network, optimizer)
    checkpoint.share_weights_between_setups(accelerator)
    return accelerator


@pytest.fixture
def save(accelerator: Accelerator, tmp_path: Path) -> Callable[..., Path]:
    """Saves a checkpoint of a step in `tmp_path`, which may come from others, given by their digests."""

    def save(step: int, *branches: str) -> Path:
        state = {"state": {"step": step, "branches": list(branches)}}
        tensors = {"ema": {"weight": torch.full((2,), float(step))}}
        return checkpoint.save(accelerator, tmp_path, step, state, tensors)

    return save
