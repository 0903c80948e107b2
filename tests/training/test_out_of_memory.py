"""Memory that runs out in the middle of a run: one line whose overrides, given to the same command, end the run.

The run is in windows of 8, 8, 8 and 3 images, twice. In micro-batches of 4 these take 2, 2, 2 and 1 passes through the
network; a checkpoint follows every second window.
"""

import re

import pytest
from torch.optim import AdamW

from finetune.run import start as start_module
from harness import faults
from harness.compare import differences, history
from harness.configs import tiny_config, write_config
from harness.faults import at_call, exhaust_memory, limit_images, limit_pixels, skip_the_export
from harness.processes import finish, run, run_two
from harness.shapes import SHAPES, write_shapes
from harness.undisturbed import command, undisturbed

IMAGES, STEPS = 27, 8
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config without the sizes of a batch, and an undisturbed run in micro-batches of 4."""
    return undisturbed(
        tmp_path_factory.mktemp("base"),
        IMAGES,
        overrides=sizes(micro_batch_size=4, global_batch_size=8),
        training={"num_epochs": 2},
        lr_scheduler={"name": "cosine", "warmup_steps": 2},
        checkpoint__every_steps=2,
    )


def sizes(**values):
    return tuple(f"training.{key}={value}" for key, value in values.items())


def fail_at_pass(call, where="forward"):
    """Memory runs out in the call-th pass of the training, counted from where a start has everything ready."""
    passes = []

    def fails(count):
        passes.append(count)
        return len(passes) == call

    at_call(start_module, "start_run", 1, lambda: limit_images(fails, where), after=True)
    skip_the_export()


def advised(outcome, size, step):
    """The overrides that the one error line names."""
    pattern = (
        rf"training\.micro_batch_size: out of memory with {size} at step {step}; set (.*), which keeps the global "
        r"batch, and run the same command again to resume from the newest checkpoint \(.*\)"
    )
    return re.fullmatch(pattern, outcome.error)[1].split(" ")


def is_the_undisturbed_run(base, run_dir):
    """No update lost or done twice, and nothing that differs by more than rounding."""
    assert [line["step"] for line in history(run_dir)] == list(range(1, STEPS + 1))
    found = differences(base / "run", run_dir, STEPS)
    assert {name: apart for name, apart in found.items() if apart > FLOAT32} == {}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("given", "call"),
    [
        ({"micro_batch_size": 4, "global_batch_size": 8}, 6),  # the second pass of the third window
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 2}, 1),
        ({"micro_batch_size": "auto", "global_batch_size": 8}, 7),  # the only pass of the fourth
    ],
    ids=["global batch and micro-batch", "micro-batch and accumulation steps", "auto"],
)
def test_the_advised_overrides_finish_the_run_with_the_same_result(base, tmp_path, given, call, where):
    def before():
        limit_images(lambda count: count > 4)  # what auto finds
        fail_at_pass(call, where)

    arguments, step = command(base, tmp_path / "run", *sizes(**given)), {6: 3, 1: 1, 7: 4}[call]
    ended = run(*arguments, folder=tmp_path, before=before)
    assert ended.returncode == 1
    assert "8 = 4 per micro-batch x 2 accumulation steps x 1 process(es)" in ended.stdout
    assert "can't allocate memory" in ended.error  # torch's own reason is in the line
    overrides = advised(ended, 4, step)
    assert overrides == ["training.micro_batch_size=2", "training.gradient_accumulation_steps=4"]
    again = finish(*arguments, *overrides, folder=tmp_path, before=skip_the_export)
    assert "8 = 2 per micro-batch x 4 accumulation steps x 1 process(es)" in again.stdout
    resumed = [line for line in again.stdout.splitlines() if line.startswith("Resuming from ")]
    checkpoint = tmp_path / "run/checkpoint-2"
    assert resumed == ([] if step == 1 else [f"Resuming from {checkpoint}: step 2 of 8."])
    is_the_undisturbed_run(base, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"global_batch_size": 8}, {"gradient_accumulation_steps": 2}], ids=" ".join)
def test_the_advised_overrides_finish_the_run_of_two_processes(base, tmp_path, given):
    def before(process):
        skip_the_export()
        if process == 1:
            fail_at_pass(6)

    arguments = command(base, tmp_path / "run", *sizes(micro_batch_size=2, **given))
    main, other = run_two(*arguments, folder=tmp_path, before=before)
    assert [main.returncode, other.returncode] == [1, 1]
    assert main.error.startswith("launch: another process of this run ended, so this one cannot continue; ")
    overrides = advised(other, 2, 3)
    assert overrides == ["training.micro_batch_size=1", "training.gradient_accumulation_steps=4"]
    ended = run_two(*arguments, *overrides, folder=tmp_path, before=lambda process: skip_the_export())
    assert [outcome.returncode for outcome in ended] == [0, 0], ended
    assert "8 = 1 per micro-batch x 4 accumulation steps x 2 process(es)" in ended[0].stdout
    assert f"Resuming from {tmp_path / 'run/checkpoint-2'}: step 2 of 8." in ended[0].stdout
    is_the_undisturbed_run(base, tmp_path / "run")


def test_single_images_that_do_not_fit_are_advised_to_need_less(base, tmp_path):
    arguments = command(base, tmp_path / "run", *sizes(micro_batch_size=1, global_batch_size=8))
    ended = run(*arguments, folder=tmp_path, before=lambda: fail_at_pass(17))  # the first pass of the third window
    assert ended.returncode == 1
    assert ended.error.startswith(
        "training.micro_batch_size: out of memory with 1 at step 3; use a smaller data.resolution, "
        "model.gradient_checkpointing, or mixed precision, and run the same command again to resume from the newest "
        "checkpoint ("
    )


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """The same run on pictures of five shapes, of 64 and 96 pixels."""
    base = tmp_path_factory.mktemp("shaped")
    changes = {
        "data__buckets": SHAPES,
        "training": {"num_epochs": 2},
        "lr_scheduler": {"name": "cosine", "warmup_steps": 2},
        "checkpoint__every_steps": 2,
    }
    config = tiny_config(write_shapes(base / "pictures", IMAGES), base / "run", **changes)
    file = write_config(base / "config.yaml", config)
    finish("--config", file, *sizes(micro_batch_size=4, global_batch_size=8), folder=base, before=skip_the_export)
    return base


def limit_the_updates(most):
    """From where a start has everything ready, a pass of more pixels than these runs out of memory."""
    at_call(start_module, "start_run", 1, lambda: limit_pixels(most), after=True)
    skip_the_export()


@pytest.mark.slow
def test_many_shapes_that_do_not_fit_are_advised_and_finish(shaped, tmp_path):
    """Of 200 pixels: two images of 96 and three of 64 fit, more do not."""
    arguments = command(shaped, tmp_path / "run", *sizes(micro_batch_size=4, global_batch_size=8))
    ended = run(*arguments, folder=tmp_path, before=lambda: limit_the_updates(200))
    assert ended.returncode == 1
    done = len(history(tmp_path / "run"))
    overrides = advised(ended, 4, done + 1)
    assert overrides == ["training.micro_batch_size=2", "training.gradient_accumulation_steps=4"]
    finish(*arguments, *overrides, folder=tmp_path, before=lambda: limit_the_updates(200))
    is_the_undisturbed_run(shaped, tmp_path / "run")


@pytest.mark.slow
def test_auto_finds_what_fits_of_the_largest_shape(shaped, tmp_path):
    def before():
        limit_pixels(200)
        skip_the_export()

    arguments = command(shaped, tmp_path / "run", *sizes(micro_batch_size="auto", global_batch_size=8))
    ended = finish(*arguments, folder=tmp_path, before=before)
    assert "8 = 2 per micro-batch x 4 accumulation steps" in ended.stdout
    is_the_undisturbed_run(shaped, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("could not create a primitive"), MemoryError("std::bad_alloc"), RuntimeError("CUDA out of memory.")],
    ids=["oneDNN", "bad_alloc", "CUDA"],
)
def test_other_libraries_words_for_it_are_understood(base, tmp_path, error):
    def fail(*_):
        raise error

    def before():
        faults.exhaust_memory = fail
        limit_images(lambda count: count > 4)  # at the start, where auto looks for a size
        fail_at_pass(2)

    ended = run(
        *command(base, tmp_path / "run", *sizes(micro_batch_size="auto", global_batch_size=8)),
        folder=tmp_path,
        before=before,
    )
    assert ended.returncode == 1
    assert "8 = 4 per micro-batch x 2 accumulation steps" in ended.stdout
    assert ended.error.endswith(f"({error})")
    assert advised(ended, 4, 1) == ["training.micro_batch_size=2", "training.gradient_accumulation_steps=4"]


def test_memory_that_runs_out_in_the_optimizer_is_not_blamed_on_the_micro_batch(base, tmp_path):
    def before():
        skip_the_export()
        at_call(AdamW, "step", 3, exhaust_memory, after=True)

    arguments = command(base, tmp_path / "run", *sizes(micro_batch_size=4, global_batch_size=8))
    ended = run(*arguments, folder=tmp_path, before=before)
    assert ended.returncode == 1
    assert ended.error.startswith("memory: ran out outside of a micro-batch: [enforce fail at ")
    assert ended.error.endswith("and run the same command again to resume from the newest checkpoint")
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]
    finish(*arguments, folder=tmp_path, before=skip_the_export)  # from the checkpoint of step 2
    is_the_undisturbed_run(base, tmp_path / "run")
