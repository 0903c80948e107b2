"""metrics.jsonl that continues where a run does, and progress on a terminal or in a file."""

import io
import json
import re
import sys
from types import SimpleNamespace

import pytest

from finetune.run.report import History, Progress, Report, duration
from harness.configs import tiny_config, write_config, write_pictures
from harness.processes import finish

LINES = [{"step": 0, "validation/loss": 2.0}, {"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 1.0}]


def test_history_is_cut_back_to_the_step_that_a_run_resumes_from(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 3, "tra')
    history = History(file, 1)
    assert history.read() == LINES[:2]
    history.add(2, {"train/loss": 5.0})
    assert file.read_text().endswith('{"step": 2, "train/loss": 5.0}\n')  # readable while the run goes on
    assert History(file, -1).read() == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


DAMAGE = [
    b"\0" * 40,
    b"\xff\xfe{",
    b"",
    b"3",
    b"[]",
    b"{}",
    b'{"step": "1"}',
    b'{"step": null}',
    b'{"step": 1, "tr',
    b"[" * 9999,
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_damaged_line_costs_itself_alone(tmp_path, damage, place):
    """As a power cut, a full disk or an editor leave it, anywhere in the file."""
    lines = [json.dumps(line).encode() for line in LINES]
    lines.insert(place, damage)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    history = History(tmp_path / "metrics.jsonl", 2)
    assert history.read() == LINES
    assert history.flaw == ("" if place == len(LINES) else "1 of its lines are damaged and left out")


@pytest.mark.parametrize("content", [None, "", "rubbish\n", json.dumps({"step": 3}) + "\n"])
def test_a_history_that_was_deleted_is_missed(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert History(tmp_path / "metrics.jsonl", 2).flaw == "it has no line of the 2 updates so far"
    assert History(tmp_path / "new.jsonl", 0).flaw == ""
    assert History(tmp_path / "new.jsonl", -1).flaw == ""


def advance(progress: Progress, steps: int, seconds: float, now: list[float]) -> None:
    for _ in range(steps):
        now[0] += seconds
        progress.advance("1/2", "loss 0.5000")


def test_without_a_terminal_a_line_is_printed_every_half_minute(capsys):
    now = [0.0]
    progress = Progress(0, 10, True, lambda: now[0])
    advance(progress, 10, 7, now)
    progress.close()
    # steps end at 7, 14, 21, 28, 35: the fifth is the first after 30 s, and five more at 7 s each are left
    assert capsys.readouterr() == (
        "step 5/10, epoch 1/2: loss 0.5000, 35 s left\nstep 10/10, epoch 1/2: loss 0.5000\n",
        "",
    )


def test_a_resumed_run_counts_its_own_steps_for_the_time_that_is_left(capsys):
    now = [100.0]
    progress = Progress(990, 1000, True, lambda: now[0])
    advance(progress, 2, 40, now)
    assert capsys.readouterr().out.splitlines()[-1] == "step 992/1000, epoch 1/2: loss 0.5000, 5 min left"  # 8 x 40 s


def test_an_evaluation_before_the_first_step_does_not_count_for_the_time_that_is_left(capsys):
    """An hour of evaluation and 300 steps of 40 s are not 300 hours."""
    now = [0.0]
    progress = Progress(0, 300, True, lambda: now[0])
    advance(progress, 1, 3600, now)
    assert capsys.readouterr().out == "step 1/300, epoch 1/2: loss 0.5000\n"  # how long a step takes is not known yet
    advance(progress, 1, 40, now)
    assert capsys.readouterr().out == "step 2/300, epoch 1/2: loss 0.5000, 3 h 19 min left\n"  # 298 x 40 s


def test_on_a_terminal_there_is_a_bar_and_no_lines(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    now = [0.0]
    progress = Progress(3, 10, True, lambda: now[0])
    advance(progress, 7, 60, now)
    progress.close()
    assert "10/10" in terminal.getvalue()
    assert "epoch 1/2" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_processes_other_than_the_main_one_show_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = [0.0]
    progress = Progress(0, 2, False, lambda: now[0])
    advance(progress, 2, 60, now)
    progress.say("done")
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min"), (90061, "25 h 1 min")],
)
def test_durations_are_written_in_seconds_minutes_or_hours(seconds, text):
    assert duration(seconds) == text


class Recorder:
    """A tracker of Accelerate that keeps what it is told."""

    name = "recorder"

    def __init__(self):
        self.logged = []

    def log(self, values, step=None, **_):
        self.logged.append((step, values))

    def finish(self): ...


def test_other_trackers_get_the_names_of_metrics_jsonl(tmp_path):
    recorder = Recorder()
    accelerator = SimpleNamespace(is_main_process=True, log_with=["recorder"], trackers=[recorder])
    accelerator.init_trackers = lambda name: accelerator.log_with.append(name)
    accelerator.log = lambda values, step: recorder.log(values, step)
    report = Report(accelerator, tmp_path / "digits", "seed: 0", {"seed": 0}, -1, 5)
    report.log(3, {"train/loss": 0.5, "validation/loss_ema": 0.25, "train/gradient_noise_scale": float("inf")})
    report.close()
    assert accelerator.log_with == ["recorder", "digits"]  # the run is called by its folder's name
    assert recorder.logged == [(3, {"train/loss": 0.5, "validation/loss_ema": 0.25})]  # JSON has no infinity
    assert History(tmp_path / "digits" / "metrics.jsonl", 3).read() == [{"step": 3, **recorder.logged[0][1]}]
    assert not (tmp_path / "digits" / "tensorboard").exists()


def test_a_run_that_is_redirected_to_a_file_prints_lines_and_no_bar(tmp_path):
    config = tiny_config(write_pictures(tmp_path / "pictures", 8), tmp_path / "run")
    outcome = finish("--config", write_config(tmp_path / "run.yaml", config), folder=tmp_path)
    assert "epoch" not in outcome.stderr  # what there is of it comes from decoding the pictures
    assert "\r" not in outcome.stdout
    # 8 pictures in windows of 8, twice: two updates, the last of which has a line
    assert re.search(r"^step 2/2, epoch 2/2: loss \d\.\d{4}, \d+\.\d images/s$", outcome.stdout, re.MULTILINE)
