"""Memory that runs out in the middle of a run, on one process and on one of two, before an update and after it."""

from functools import partial

import pytest
from scarce import above, at_training_pass, command, is_said, make_base, run_out, same_run
from scripted import at_call, script, two
from torch.optim import AdamW

from tiny import history


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    make_base(base)
    return base


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 6, 7])  # the first of all; the second of window 3's two; the tail's only one
def test_a_window_is_done_again_in_smaller_micro_batches(base, tmp_path, call, where):
    def before():
        above(4)
        at_training_pass(call, where)

    done = script(*command(base, tmp_path), folder=tmp_path, before=before)
    assert done.returncode == 0, done.stderr
    assert "8 = 4 per micro-batch x 2 accumulation steps x 1 process(es)" in done.stdout
    assert (done.stdout + done.stderr).count("Out of memory with micro-batches of 4: on with 2.") == 1
    same_run(base, tmp_path / "run")


def test_a_given_micro_batch_is_not_made_smaller_but_the_checkpoint_goes_on(base, tmp_path):
    arguments = command(base, tmp_path, "training.micro_batch_size=4")
    ended = script(*arguments, folder=tmp_path, before=partial(at_training_pass, 6))
    assert ended.returncode == 1
    assert is_said(ended, 4)
    assert "Traceback" not in ended.stderr
    again = script(*arguments[:-1], "training.micro_batch_size=2", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"Going on from {tmp_path / 'run' / 'checkpoint-2'}: step 2 of 8." in again.stdout
    same_run(base, tmp_path / "run")


def test_single_images_cannot_be_made_fewer(base, tmp_path):
    ended = script(
        *command(base, tmp_path, "training.micro_batch_size=1"), folder=tmp_path, before=partial(at_training_pass, 17)
    )
    assert ended.returncode == 1
    (line,) = ended.errors
    assert line.startswith(
        "error: training.micro_batch_size: out of memory with 1 at step 3; use a smaller data.resolution, "
        "model.gradient_checkpointing, or mixed precision, and the same command goes on from the last checkpoint ("
    )
    assert "Traceback" not in ended.stderr


def onednn():
    raise RuntimeError("could not create a primitive")


def bad_alloc():
    raise MemoryError("std::bad_alloc")


@pytest.mark.parametrize("error", [onednn, bad_alloc])
def test_other_words_for_it(base, tmp_path, monkeypatch, error):
    monkeypatch.setattr("scarce.run_out", error)
    done = script(*command(base, tmp_path), folder=tmp_path, before=partial(above, 2))
    assert done.returncode == 0, done.stderr  # found at the start
    assert "8 = 2 per micro-batch x 4 accumulation steps x 1 process(es)" in done.stdout
    middle = script(
        *command(base, tmp_path), f"output_dir={tmp_path / 'middle'}",
        folder=tmp_path, before=partial(at_training_pass, 2),
    )  # fmt: skip
    assert middle.returncode == 0, middle.stderr
    assert "Out of memory with micro-batches of 8: on with 4." in middle.stdout + middle.stderr
    same_run(base, tmp_path / "run")


def test_one_of_two_runs_out_in_the_middle(base, tmp_path):
    def before(process):
        above(2)
        if process == 1:
            at_training_pass(6)

    arguments = command(base, tmp_path)
    ended = [each.wait() for each in two(*arguments, folder=tmp_path, before=before)]
    assert [each.returncode for each in ended] == [1, 1], ended
    assert is_said(ended[1], 2)
    assert [line.split(" (")[0] for line in ended[0].errors] == [
        "error: launch: another process of this run ended, and this one cannot go on without it; its own lines say why"
    ]
    again = [each.wait() for each in two(*arguments, "training.micro_batch_size=1", folder=tmp_path)]
    assert [each.returncode for each in again] == [0, 0], again
    assert "checkpoint-2: step 2 of 8." in again[0].stdout
    same_run(base, tmp_path / "run")


def test_after_an_update_has_begun_nothing_is_done_again(base, tmp_path):
    ended = script(
        *command(base, tmp_path), folder=tmp_path, before=lambda: at_call(AdamW, "step", 3, run_out, after=True)
    )
    assert ended.returncode == 1
    assert "on with" not in ended.stdout + ended.stderr
    (line,) = ended.errors
    assert line.startswith("error: memory: ran out outside of a micro-batch: [enforce fail at ")
    assert line.endswith("and the same command goes on from the newest checkpoint")
    assert "Traceback" not in ended.stderr
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]
    assert script(*command(base, tmp_path), folder=tmp_path).returncode == 0  # from the checkpoint of step 2
    same_run(base, tmp_path / "run")
