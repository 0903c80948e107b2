"""Updates that the gradient scaler of fp16 skips.

Accelerate has fp16 on a GPU alone. Here its own half precision, with torch's scaler, is put under a run on the CPU, and
the scale doubles after every second good update, so that gradients overflow again and again.
"""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from scripted import script, two

from finetune import launch
from finetune.run import Run
from splits import moments
from tiny import history, stop_after_updates, timeless, tiny_config, weights, write_config, write_pictures

STEPS, RATE = 12, 1e-3  # 19 images in windows of 8: 3 updates an epoch, 4 epochs


def in_half_precision(told=None):
    """Runs from here on are in fp16; what every update left is written to a file."""

    class Half(launch.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.state._mixed_precision, self.native_amp = "fp16", True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)

    launch.Accelerator = Half
    finish_step = Run.finish_step

    def finishing(run, *arguments):
        finish_step(run, *arguments)
        parts = {"model": run.unet.parameters(), "ema": run.ema.shadow_params}
        line = {name: sum(hash(tensor.numpy(force=True).tobytes()) for tensor in part) for name, part in parts.items()}
        with open(told, "a") as file:
            print(json.dumps({**line, "scale": run.accelerator.scaler.get_scale()}), file=file)

    if told is not None:
        Run.finish_step = finishing


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it that was not disturbed."""
    base = tmp_path_factory.mktemp("base")
    config = tiny_config(
        write_pictures(base / "pictures", 19),
        base / "run",
        training__num_epochs=4,
        optimizer__learning_rate=RATE,
        lr_scheduler={"name": "linear"},
        checkpoint={"every_steps": 1, "keep": STEPS},
    )
    write_config(base / "config.yaml", config)
    done = script("--config", base / "config.yaml", folder=base, before=partial(in_half_precision, base / "told"))
    assert done.returncode == 0, done.stderr
    assert "fp16 mixed precision" in done.stdout
    return base


@pytest.fixture(scope="module")
def skipped(base):
    """Of each update, whether it was skipped: its gradient's norm is not a number then, and is not logged."""
    skipped = ["train/grad_norm" not in line for line in history(base / "run")]
    assert skipped[0]
    assert {(False, True), (True, False), (False, False)} <= set(pairwise(skipped))
    return skipped


def test_a_skipped_update_moves_neither_weights_nor_average(base, skipped):
    told = [json.loads(line) for line in (base / "told").read_text().splitlines()]
    for part in ("model", "ema"):
        still = [after[part] == before[part] for before, after in pairwise(told)]
        assert still == skipped[1:]
    first = weights(base / "run", 1)
    assert all(torch.equal(first[name], weight) for name, weight in weights(base / "run", 1, "ema").items())


def test_a_skipped_update_halves_the_scale(base, skipped):
    scales = [2.0**18, *(json.loads(line)["scale"] for line in (base / "told").read_text().splitlines())]
    factors = [after / before for before, after in pairwise(scales)]
    assert [factor == 0.5 for factor in factors] == skipped
    assert set(factors) == {0.5, 1.0, 2.0}


def test_a_skipped_update_does_not_move_the_schedule(base, skipped):
    """The update after it has the learning rate that it would have had: linear, from 1e-3 at the first one applied."""
    applied = [skipped[:step].count(False) for step in range(STEPS)]
    rates = [line["train/learning_rate"] for line in history(base / "run")]
    assert rates == pytest.approx([RATE * (STEPS - updates) / STEPS for updates in applied], rel=1e-12)


def test_skipped_updates_are_counted(base, skipped):
    counted = [line["train/skipped_updates"] for line in history(base / "run")]
    assert counted == [skipped[: step + 1].count(True) for step in range(STEPS)]
    assert {int(count) for count in moments(base / "run", STEPS, "step").values()} == {skipped.count(False)}
    state = json.loads((base / "run" / f"checkpoint-{STEPS}" / "run_state.json").read_text())["state"]
    assert state["skipped"] == skipped.count(True)


@pytest.mark.parametrize("after", ["a skipped update", "a good one, the first of two"])
def test_it_is_the_same_run_after_resuming(base, skipped, tmp_path, after):
    if after == "a skipped update":
        stop = max(step for step in range(1, STEPS) if skipped[step - 1])
    else:
        stop = max(step for step in range(2, STEPS) if skipped[step - 2] and not skipped[step - 1])

    def before():
        in_half_precision()
        stop_after_updates(stop)

    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    stopped = script(*arguments, folder=tmp_path, before=before)
    assert f"Stopped after step {stop} of {STEPS}" in stopped.stdout
    again = script(*arguments, folder=tmp_path, before=in_half_precision)
    assert again.returncode == 0, again.stderr
    assert timeless(tmp_path / "run") == timeless(base / "run")
    for part in ("model", "ema"):
        expected, seen = weights(base / "run", STEPS, part), weights(tmp_path / "run", STEPS, part)
        assert all(torch.equal(expected[name], seen[name]) for name in expected)
    scales = [(each / "run" / f"checkpoint-{STEPS}" / "scaler.pt").read_bytes() for each in (base, tmp_path)]
    assert scales[0] == scales[1]


def test_two_processes_skip_the_same_updates(base, tmp_path):
    """Each has a scaler of its own; they stay of one mind, since both look at the gradient that was reduced. Which
    updates are skipped is the split's: what overflows is a micro-batch's gradient, before it is divided by all."""
    told = [tmp_path / "told-0", tmp_path / "told-1"]
    arguments = ("--config", base / "config.yaml", "training.gradient_accumulation_steps=1")
    started = two(
        *arguments, f"output_dir={tmp_path / 'run'}",
        folder=tmp_path, before=lambda process: in_half_precision(told[process]),
    )  # fmt: skip
    ended = [each.wait() for each in started]
    assert [each.returncode for each in ended] == [0, 0], ended
    main, other = ([json.loads(line) for line in file.read_text().splitlines()] for file in told)
    assert main == other  # weights, average and scale after each update, to the bit
    skipped = ["train/grad_norm" not in line for line in history(tmp_path / "run")]
    assert 0 < skipped.count(True) < STEPS - 1
    for part in ("model", "ema"):
        assert [after[part] == before[part] for before, after in pairwise(main)] == skipped[1:]
    assert {int(count) for count in moments(tmp_path / "run", STEPS, "step").values()} == {skipped.count(False)}


def test_fp16_on_a_cpu_is_refused_in_one_line(base, tmp_path):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    refused = script(*arguments, folder=tmp_path, ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_USE_CPU="true")
    assert refused.returncode == 2
    (line,) = refused.errors
    assert "fp16" in line
    assert "cpu" in line
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()
