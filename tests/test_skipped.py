"""Updates that fp16's gradient scaler skips.

Accelerate offers fp16 on a GPU only. Here its half precision, with torch's scaler, is put under a run on the CPU. The
scale doubles after every second good update, so that gradients overflow again and again.
"""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator

from finetune.run.run import Run
from harness.compare import differing, history, moments, run_state, unequal, weights
from harness.configs import UNET
from harness.faults import skip_the_export, stop_after_updates
from harness.processes import finish, run, run_two
from harness.undisturbed import undisturbed

STEPS, RATE = 12, 1e-3  # 19 images in windows of 8: 3 updates an epoch, 4 epochs
SCALE = 2.0**18


def in_half_precision(log=None):
    """Runs from here on are in fp16; with `log`, hashes and the scale after every update are written to this file."""
    skip_the_export()
    build, finish_step = Accelerator.__init__, Run.finish_step

    def build_half(accelerator, **options):
        build(accelerator, **options)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)

    def finish_and_log(run, *arguments):
        finish_step(run, *arguments)
        parts = {"model": run.kind.network.parameters(), "ema": run.ema.shadow_params}
        line = {name: sum(hash(tensor.numpy(force=True).tobytes()) for tensor in part) for name, part in parts.items()}
        with open(log, "a") as file:
            print(json.dumps({**line, "scale": run.accelerator.scaler.get_scale()}), file=file)

    Accelerator.__init__ = build_half
    if log is not None:
        Run.finish_step = finish_and_log


def read(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def skipped_updates(run_dir):
    """Of each update, whether it was skipped: its gradient's norm is not finite then, and is not logged."""
    return ["train/grad_norm" not in line for line in history(run_dir)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A config, and a run of it that was not disturbed."""
    base = tmp_path_factory.mktemp("base")
    undisturbed(
        base,
        images=19,
        before=partial(in_half_precision, base / "log"),
        model__unet=UNET,
        training__num_epochs=4,
        optimizer__learning_rate=RATE,
        lr_scheduler={"name": "linear"},
        checkpoint={"every_steps": 1, "keep": STEPS},
        logging__tracker="tensorboard",
    )
    assert any("fp16 mixed precision" in printed.read_text() for printed in base.glob("out-*"))
    return base


@pytest.fixture(scope="module")
def skipped(base):
    skipped = skipped_updates(base / "run")
    assert skipped[0]
    assert {(False, True), (True, False), (False, False)} <= set(pairwise(skipped))  # else the tests below show little
    return skipped


def test_a_skipped_update_changes_neither_weights_nor_average(base, skipped):
    log = read(base / "log")
    for part in ("model", "ema"):
        unchanged = [after[part] == before[part] for before, after in pairwise(log)]
        assert unchanged == skipped[1:]
    # The first update is skipped: the average is still the weights that it was made of.
    assert unequal(weights(base / "run", 1), weights(base / "run", 1, "ema")) == []


def test_a_skipped_update_halves_the_scale(base, skipped):
    scales = [SCALE, *(line["scale"] for line in read(base / "log"))]
    factors = [after / before for before, after in pairwise(scales)]
    assert [factor == 0.5 for factor in factors] == skipped
    assert set(factors) == {0.5, 1.0, 2.0}


def test_a_skipped_update_does_not_advance_the_learning_rate(base, skipped):
    """The update after it has the learning rate that it would have had: linear, from 1e-3 at the first one applied."""
    applied = [skipped[:step].count(False) for step in range(STEPS)]
    rates = [line["train/learning_rate"] for line in history(base / "run")]
    assert rates == pytest.approx([RATE * (STEPS - updates) / STEPS for updates in applied], rel=1e-12)


def test_skipped_updates_are_counted(base, skipped):
    counted = [line["train/skipped_updates"] for line in history(base / "run")]
    assert counted == [skipped[: step + 1].count(True) for step in range(STEPS)]
    assert {int(count) for count in moments(base / "run", STEPS)["step"].values()} == {skipped.count(False)}
    state = run_state(base / "run", STEPS)["state"]
    assert state["skipped"] == skipped.count(True)


@pytest.mark.parametrize("last", ["a skipped update", "an applied one, the first of two"])
def test_resuming_in_fp16_is_bit_exact_after(base, skipped, tmp_path, last):
    if last == "a skipped update":
        stop = max(step for step in range(1, STEPS) if skipped[step - 1])
    else:  # the scaler has counted one good update of the two after which its scale doubles
        stop = max(step for step in range(2, STEPS) if skipped[step - 2] and not skipped[step - 1])

    def before():
        in_half_precision()
        stop_after_updates(stop)

    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    stopped = run(*arguments, folder=tmp_path, before=before)
    assert stopped.returncode == 143
    assert f"Stopped after step {stop} of {STEPS}" in stopped.stdout
    again = finish(*arguments, folder=tmp_path, before=in_half_precision)
    assert f"checkpoint-{stop}: step {stop} of {STEPS}" in again.stdout
    assert differing(base / "run", tmp_path / "run", STEPS) == []
    scalers = [folder / "run" / f"checkpoint-{STEPS}" / "scaler.pt" for folder in (base, tmp_path)]
    assert scalers[0].read_bytes() == scalers[1].read_bytes()


@pytest.mark.slow
def test_two_processes_skip_the_same_updates(base, tmp_path):
    """Each has a scaler of its own; they agree, since both look at the reduced gradient. Which updates are skipped
    depends on the layout: what overflows is a micro-batch's gradient, before it is averaged."""
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    arguments = ("--config", base / "config.yaml", "training.gradient_accumulation_steps=1")
    ended = run_two(
        *(*arguments, f"output_dir={tmp_path / 'run'}"),
        folder=tmp_path,
        before=lambda process: in_half_precision(logs[process]),
    )
    assert [outcome.returncode for outcome in ended] == [0, 0], ended
    main, other = map(read, logs)
    assert main == other  # weights, average and scale after each update, to the bit
    skipped = skipped_updates(tmp_path / "run")
    assert 0 < skipped.count(True) < STEPS - 1
    for part in ("model", "ema"):
        assert [after[part] == before[part] for before, after in pairwise(main)] == skipped[1:]
    assert {int(count) for count in moments(tmp_path / "run", STEPS)["step"].values()} == {skipped.count(False)}


def test_fp16_on_a_cpu_is_refused_in_one_line(base, tmp_path):
    arguments = ("--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}")
    refused = run(*arguments, folder=tmp_path, ACCELERATE_MIXED_PRECISION="fp16", ACCELERATE_USE_CPU="true")
    assert refused.returncode == 2
    assert refused.error.startswith("launch: ")
    assert "fp16" in refused.error
    assert not (tmp_path / "run").exists()
