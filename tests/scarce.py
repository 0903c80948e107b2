"""Memory that runs out where a test wants it to, and what a run that came through has to be."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DModel
from scripted import at_call, script

from finetune.run import Run
from splits import moments, relative_difference
from tiny import timeless, tiny_config, weights, write_config, write_pictures

IMAGES, BATCH, STEPS = 27, 8, 8  # windows of 8, 8, 8 and 3 images, twice
FLOAT32 = 1e-5
OUT_OF_MEMORY = (
    "error: training.micro_batch_size: out of memory with {} at step {}; set a smaller one (the global batch can stay "
    "as it is), and the same command goes on from the last checkpoint ([enforce fail at "
)


def is_said(outcome, size, step=3):
    """One line, and torch's own words in it."""
    (line,) = outcome.errors
    return line.startswith(OUT_OF_MEMORY.format(size, step)) and "can't allocate memory" in line


def run_out(*_):
    """torch's own error: nobody has a pebibyte."""
    torch.empty(2**50, dtype=torch.uint8)


def short_of_memory(fails, where="forward"):
    """From here on the network runs out of memory with as many images as `fails` says."""
    forward = UNet2DModel.forward

    def limited(self, images, *rest, **keywords):
        short = fails(len(images))
        if short and where == "forward":
            run_out()
        output = forward(self, images, *rest, **keywords)
        if short and where == "backward" and output.sample.requires_grad:
            output.sample.register_hook(run_out)
        return output

    UNet2DModel.forward = limited


def above(limit, where="forward"):
    short_of_memory(lambda count: count > limit, where)


def at_training_pass(call, where="forward"):
    """The call-th pass of the training itself, counted from where a start has everything ready."""
    passes = []
    act = partial(short_of_memory, lambda count: passes.append(1) or len(passes) == call, where)
    at_call(Run, "resume", 1, act, after=True)


def make_base(base):
    """Pictures, a config with auto, and an undisturbed run in micro-batches of 4."""
    config = tiny_config(
        write_pictures(base / "pictures", IMAGES),
        base / "undisturbed",
        training={"micro_batch_size": "auto", "global_batch_size": BATCH, "num_epochs": 2},
        lr_scheduler={"name": "cosine", "warmup_steps": 2},
        checkpoint__every_steps=2,
    )
    write_config(base / "auto.yaml", config)
    done = script("--config", base / "auto.yaml", "training.micro_batch_size=4", folder=base)
    assert done.returncode == 0, done.stderr


def same_run(base, run):
    """No update lost or doubled, and nothing that differs but by rounding; the noise scale is estimated from splits."""
    lines, others = (
        [{name: value for name, value in line.items() if "noise_scale" not in name} for line in timeless(output_dir)]
        for output_dir in (base / "undisturbed", run)
    )
    assert [line["step"] for line in others] == list(range(1, STEPS + 1))
    assert others == [pytest.approx(line, rel=FLOAT32) for line in lines]
    for part in ("model", "ema"):
        assert relative_difference(weights(base / "undisturbed", STEPS, part), weights(run, STEPS, part)) < FLOAT32
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        assert relative_difference(moments(base / "undisturbed", STEPS, kind), moments(run, STEPS, kind)) < FLOAT32


def command(base, tmp_path, *overrides):
    return "--config", base / "auto.yaml", f"output_dir={tmp_path / 'run'}", *overrides
