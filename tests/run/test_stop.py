"""A run that gets a signal, or whose other process ends: it saves, says so, and resumes bit-identically."""

import os
import signal
from functools import partial

import pytest
from diffusers import UNet2DModel

from finetune.core import distributed, stopping
from finetune.evaluation.validation import Validation
from finetune.models import unconditional
from finetune.run import start
from finetune.training.window import Window
from harness.compare import differing, valid_checkpoints
from harness.configs import EVALUATED_STEPS
from harness.faults import at_call, kill_at, signal_at, signal_self
from harness.processes import finish, run, run_two

STOPPED = "Stopped after step {} of 6; everything is saved. Run the same command again to resume."


def count_forward_passes(number, call, tally):
    """A signal at the call-th forward pass of the run itself; a file counts how many there were."""
    at_call(start, "_open_report", 1, partial(_count_forward_passes, number, call, tally), after=True)


def _count_forward_passes(number, call, tally):
    signal_at(number, UNet2DModel, "forward", call)
    forward = UNet2DModel.forward

    def counted(*arguments, **keywords):
        with open(tally, "a") as file:
            file.write(".")
        return forward(*arguments, **keywords)

    UNet2DModel.forward = counted


@pytest.mark.parametrize(
    ("number", "call", "finished", "saved"),
    [
        # Forward passes: 2 of the first validation (plain, averaged), 2 of sampling, 1 of the denoising strip, and 2 of
        # each update.
        (signal.SIGTERM, 1, 1, 0),
        (signal.SIGINT, 3, 3, 0),
        (signal.SIGTERM, 6, 7, 1),
        (signal.SIGINT, 6, 7, 1),
        (signal.SIGUSR1, 7, 7, 1),
        (signal.SIGHUP, 7, 7, 1),
    ],
)
def test_a_signal_ends_the_run_after_the_present_update_or_evaluation_step(
    undisturbed, tmp_path, number, call, finished, saved
):
    output_dir = tmp_path / "run"
    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    stopped = run(*command, folder=tmp_path, before=partial(count_forward_passes, number, call, tmp_path / "tally"))
    assert stopped.returncode == (130 if number == signal.SIGINT else 143), stopped.stderr
    assert len((tmp_path / "tally").read_text()) == finished
    assert stopped.stdout.count(STOPPED.format(saved)) == 1
    assert "Traceback" not in stopped.stderr
    assert valid_checkpoints(output_dir) == [saved]
    finish(*command, folder=tmp_path)
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []


def test_an_ignored_hangup_stays_ignored(undisturbed, tmp_path):
    """`nohup` starts a process like this."""
    output_dir = tmp_path / "run"

    def before():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal_at(signal.SIGHUP, Window, "add", 1)

    finish("--config", undisturbed / "config.yaml", f"output_dir={output_dir}", folder=tmp_path, before=before)
    assert differing(undisturbed / "run", output_dir, EVALUATED_STEPS) == []


def test_the_end_of_the_launcher_is_not_a_second_signal(undisturbed, tmp_path):
    """It comes as SIGTERM, after the signal that the launcher got too."""
    output_dir = tmp_path / "run"

    def before():
        stopping._ECHO_SECONDS = -1.0
        at_call(Window, "add", 5, act)  # in the third update

    def act():
        signal_self(signal.SIGINT)
        os.getppid = lambda: 1
        signal_self(signal.SIGTERM)

    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    assert run(*command, folder=tmp_path, before=before).returncode == 130
    assert valid_checkpoints(output_dir) == [2, 3]


def test_a_second_signal_ends_the_process_at_once(undisturbed, tmp_path):
    """Two seconds after the first, or it counts as an echo of it; here after no time at all."""
    output_dir = tmp_path / "run"

    def before():
        stopping._ECHO_SECONDS = -1.0
        at_call(Window, "add", 5, lambda: signal_self(signal.SIGTERM, signal.SIGTERM))  # in the third update

    command = ("--config", undisturbed / "config.yaml", f"output_dir={output_dir}")
    assert run(*command, folder=tmp_path, before=before).returncode == -signal.SIGTERM
    assert valid_checkpoints(output_dir) == [2]


@pytest.mark.parametrize(
    ("owner", "name"), [(distributed, "on_main_process"), (unconditional, "build_unet")], ids=["config", "model"]
)
def test_ctrl_c_before_the_run_starts_prints_no_traceback_and_leaves_no_folder(undisturbed, tmp_path, owner, name):
    command = ("--config", undisturbed / "config.yaml", f"output_dir={tmp_path / 'run'}")
    stopped = run(*command, folder=tmp_path, before=partial(signal_at, signal.SIGINT, owner, name, 1))
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(1,), (0, 1)])
@pytest.mark.parametrize(("moment", "saved"), [((Validation, "losses"), 0), ((Window, "add"), 1)])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(
    undisturbed, on_two, tmp_path, signalled, moment, saved
):
    output_dir = tmp_path / "run"

    def before(process):
        if process in signalled:  # twice, as from the launcher that passes on what its whole group got
            at_call(*moment, 1, lambda: signal_self(signal.SIGTERM, signal.SIGTERM))

    command = (*on_two, f"output_dir={output_dir}")
    outcomes = run_two(*command, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [143, 143], outcomes
    assert [outcome.stdout.count(STOPPED.format(saved)) for outcome in outcomes] == [1, 0]
    assert not any("Traceback" in outcome.stderr for outcome in outcomes)
    assert valid_checkpoints(output_dir) == [saved]
    assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
    assert differing(undisturbed / "two", output_dir, EVALUATED_STEPS) == []


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_of_two_processes_ends_with_one_line_when_one_is_killed(undisturbed, on_two, tmp_path, killed):
    output_dir = tmp_path / "run"

    def before(process):
        if process == killed:
            kill_at(Window, "add", 6)  # in the fourth update: 2 + 2 + 1 micro-steps come before it

    command = (*on_two, f"output_dir={output_dir}")
    outcomes = run_two(*command, folder=tmp_path, before=before)
    assert outcomes[killed].returncode == -signal.SIGKILL
    left = outcomes[1 - killed]
    assert left.returncode == 1, left
    assert left.error.startswith("launch: another process of this run ended")
    assert valid_checkpoints(output_dir) == [2]
    assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
    assert differing(undisturbed / "two", output_dir, EVALUATED_STEPS) == []


@pytest.mark.parametrize(
    "changes",
    [
        ("training.seed=1",),
        ("training.micro_batch_size=3", "training.gradient_accumulation_steps=null", "training.global_batch_size=8"),
        ("data.source=nowhere/at/all",),
    ],
    ids=["config", "batch", "data"],
)
def test_a_users_mistake_on_two_processes_is_printed_once(undisturbed, tmp_path, changes):
    command = ("--config", undisturbed / "config.yaml", f"output_dir={tmp_path / 'run'}", *changes)
    outcomes = run_two(*command, folder=tmp_path)
    assert [outcome.returncode for outcome in outcomes] == [2, 2], outcomes
    assert len(outcomes[0].errors) == 1
    assert outcomes[1].errors == []
    assert not any("Traceback" in outcome.stderr for outcome in outcomes)
    assert not (tmp_path / "run").exists()
