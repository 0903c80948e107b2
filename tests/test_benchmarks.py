"""The benchmarks run: each in its short form, to its end. What they measure is for a quiet machine."""

import os
import subprocess
import sys

import pytest

from tiny import ROOT

SHORT = {
    "checkpointing": ["--short"],
    "crash": ["--kills", "2"],
    "invariance": ["--short"],
    "loader": ["--short"],
    "loss_signal": ["--short"],
    "memory": ["--short"],
    "speed": ["--short"],
}


def test_every_benchmark_is_here():
    assert {path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")} == {*SHORT, "bare"}


@pytest.mark.parametrize(("name", "arguments"), [*SHORT.items(), ("speed", ["--compile", "--short"])])
def test_it_runs(name, arguments):
    command = [sys.executable, ROOT / f"tests/benchmarks/{name}.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("\n") > 2
