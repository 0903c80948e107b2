"""Real commands: what a launch sets up, what its signals do, and that no process trains on without its launcher."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import joblib
import psutil
import pytest

from harness.compare import valid_checkpoints
from harness.configs import write_endless
from harness.processes import default_signals, run_two, start_command, wait_for
from harness.supervisors import LAUNCH, ONE, PYTHON, TWO

pytestmark = pytest.mark.slow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_endless(tmp_path_factory.mktemp("base"))


class Running:
    """A command that trains, once its first update is logged."""

    def __init__(self, command, config, output_dir, *more):
        self.output_dir = output_dir
        self.process = start_command(*command, "--config", config, f"output_dir={output_dir}", *more)
        metrics = output_dir / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and "train/loss" in metrics.read_text(), self.process)
        self.launched = psutil.Process(self.process.pid).children()

    def stopped(self):
        """Wait until every process has ended; the run has to be saved. Returns output and errors."""
        output, errors = self.process.communicate(timeout=120)
        _, alive = psutil.wait_procs(self.launched, timeout=120)
        assert alive == []
        (saved,) = valid_checkpoints(self.output_dir)
        assert saved >= 1
        return output, errors


@pytest.mark.parametrize(
    ("command", "send", "number"),
    [
        (ONE, os.kill, signal.SIGTERM),  # which this launcher does not handle
        (TWO, os.kill, signal.SIGKILL),
        (ONE, os.killpg, signal.SIGINT),  # SIGTERM to all of two processes is in test_supervisors.py
    ],
    ids=[
        "the launcher of 1 process, SIGTERM",
        "the launcher of 2 processes, SIGKILL",
        "all of a launch of 1 process, SIGINT",
    ],
)
def test_a_signal_stops_all_processes_and_the_run_is_saved(config, tmp_path, command, send, number):
    """To the launcher alone, as a person sends it, or to all, as Slurm, a terminal and systemd do."""
    running = Running(command, config, tmp_path / "run")
    send(running.process.pid, number)
    output, _ = running.stopped()
    assert output.count("Stopped after step ") == 1


def test_a_terminal_that_is_closed_stops_the_run_and_it_is_saved(config, tmp_path):
    """The kernel sends SIGHUP, and what is printed to the terminal afterwards fails."""
    output_dir = tmp_path / "run"
    pid, terminal = pty.fork()  # and not start_command: the terminal has to be the one that controls the session
    if pid == 0:
        default_signals()
        os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
        command = [*PYTHON, "--config", str(config), f"output_dir={output_dir}"]
        os.chdir(Path(__file__).parents[2])
        os.execv(sys.executable, command)
    while not (output_dir / "metrics.jsonl").exists() or "train/loss" not in (output_dir / "metrics.jsonl").read_text():
        os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    assert len(valid_checkpoints(output_dir)) == 1


def test_ctrl_c_in_the_middle_of_the_imports_prints_nothing(config):
    process = start_command(*PYTHON, "--config", config)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "libtorch_python" in maps.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_accelerate_launch_with_two_processes_that_starts_one_is_refused(config, tmp_path):
    command = (*LAUNCH, "--num_processes", "2", "--quiet", "train.py", "--config", config, f"output_dir={tmp_path}/run")
    process = start_command(*command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1  # the launcher's
    assert errors.splitlines()[-1].startswith("error: launch: accelerate launch was asked for several processes and")
    assert not (tmp_path / "run").exists()


def test_two_processes_without_accelerates_variable_are_refused_with_one_line_that_names_it(config, tmp_path):
    """As torchrun starts them: without a GPU Accelerate would have each of them train alone."""
    ended = run_two("--config", config, "--check", folder=tmp_path, ACCELERATE_USE_CPU="false")
    assert [outcome.returncode for outcome in ended] == [2, 2]
    assert [outcome.stdout for outcome in ended] == ["", ""]
    (error,) = [error for outcome in ended for error in outcome.errors]
    assert error.startswith("launch: found 1 process where WORLD_SIZE in the environment is 2: ")
    assert "ACCELERATE_USE_CPU=true" in error


def test_torchrun_sets_what_connects_the_processes_of_these_tests(tmp_path):
    """harness.processes, which sets the same for each, starts them without a launcher."""
    script = tmp_path / "script.py"
    names = "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    script.write_text(f"import os\nprint(*map(os.environ.__getitem__, {names}))\n")
    process = start_command(*TORCHRUN, script)
    output, errors = process.communicate(timeout=120)
    first, second = sorted(line.split() for line in output.splitlines())
    assert [first[:3], second[:3]] == [["2", "0", "0"], ["2", "1", "1"]], errors
    assert first[3:] == second[3:]  # the store that connects them


THREADS = """
import sys, torch
from accelerate import Accelerator
from finetune.core.launch import use_available_cores
use_available_cores(Accelerator())
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    "command", [(sys.executable,), (*LAUNCH, "--num_processes", "1")], ids=["python", "accelerate"]
)
def test_one_process_on_a_cpu_takes_the_cores_that_it_may_use(tmp_path, command):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    output = subprocess.run([*command, script], env=environment, capture_output=True, text=True, check=True).stdout
    assert int(output) == min(joblib.cpu_count(), psutil.cpu_count(logical=False))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_would_spread_the_model_is_refused_with_one_line_for_all_processes(config, tmp_path, name):
    """On CPUs Accelerate alone would train them as plain DDP."""
    environment = {f"ACCELERATE_USE_{name}": "true"}
    ended = run_two("--config", config, f"output_dir={tmp_path}/run", folder=tmp_path, **environment)
    assert [outcome.returncode for outcome in ended] == [2, 2]
    (error,) = [error for outcome in ended for error in outcome.errors]
    assert error.startswith(f"launch: found ACCELERATE_USE_{name}=true, from accelerate launch --use_")
    assert "training.shard" in error
    assert not (tmp_path / "run").exists()


def test_use_fsdp_sets_the_variable_that_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['ACCELERATE_USE_FSDP'])\n")
    process = start_command(*LAUNCH, "--num_processes", "2", "--use_fsdp", "--main_process_port", "0", script)
    output, errors = process.communicate(timeout=120)
    assert output == "true\ntrue\n", errors
