"""One run, however it is split: over micro-batches, accumulation steps and processes, in every precision."""

import json
from pathlib import Path

import pytest
import torch

from tiny import history, launch, tiny_config, weights, write_config, write_pictures

B = 8
SPLITS = {  # processes x micro-batch x accumulation steps; 3 does not divide the tails, nor 8: its runs have B = 9
    "1x8x1": (1, 8, 1),
    "1x2x4": (1, 2, 4),
    "1x1x8": (1, 1, 8),
    "2x2x2": (2, 2, 2),
    "2x1x4": (2, 1, 4),
}
TAILS = {  # images -> the last window has
    17: "1 image, fewer than processes",
    15: "B - 1 images",
    19: "3 images, which micro-batches of 2 do not divide",
    5: "all images, fewer than B",
}
EPOCHS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every split of every tail, in both precisions: {(precision, split, images): output folder}."""
    base = tmp_path_factory.mktemp("invariance")
    found, launches = {}, {}
    for precision in ("float32", "float64"):
        for name, (processes, micro, steps) in SPLITS.items():
            for images in TAILS:
                output_dir = base / f"{precision}-{name}-{images}"
                config = tiny_config(
                    write_pictures(base / str(images), images, (10, 8)),
                    output_dir,
                    data__crop="random",
                    data__random_flip=True,
                    training__micro_batch_size=micro,
                    training__gradient_accumulation_steps=steps,
                    training__num_epochs=EPOCHS,
                    training__snr_gamma=5.0,
                    lr_scheduler={"name": "cosine", "warmup_steps": 2},
                )
                file = write_config(base / f"{precision}-{name}-{images}.yaml", config)
                launches.setdefault((precision, processes), []).append(file)
                found[precision, name, images] = output_dir
    for (precision, processes), files in launches.items():
        flags = ["--float64"] if precision == "float64" else []
        outcome = launch(*flags, *files, processes=processes, script="tests/several.py")
        assert outcome.returncode == 0, outcome.stderr[-3000:]
    return found


def slots(output_dir: Path) -> list:
    """(epoch, position, image, digest of pixels, noise and timestep) of every real slot, in the order of the run."""
    found = [json.loads(line) for file in output_dir.glob("slots-*.jsonl") for line in file.read_text().splitlines()]
    return sorted(found)


def relative_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors as one vector.

    Not tensor by tensor: the gradient of an attention key's bias is nothing but rounding, since the softmax cancels it,
    and Adam makes steps of full size of it.
    """
    assert one.keys() == other.keys()
    flat = [torch.cat([tensors[key].double().flatten() for key in one]) for tensors in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


def moments(output_dir: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    state = torch.load(output_dir / f"checkpoint-{step}" / "optimizer.bin", weights_only=True)["state"]
    return {str(index): tensors[kind] for index, tensors in state.items()}


@pytest.mark.parametrize("images", TAILS, ids=TAILS.values())
@pytest.mark.parametrize("split", [name for name in SPLITS if name != "1x8x1"])
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_every_split_is_the_same_run(runs, precision, bound, split, images):
    reference, other = runs[precision, "1x8x1", images], runs[precision, split, images]
    steps = EPOCHS * -(-images // B)

    # the same images, pixels, noise and timesteps, to the bit
    assert len(slots(reference)) == EPOCHS * images
    assert slots(other) == slots(reference)

    # the same curve: loss, learning rate and gradient norm of every update, the average of every epoch
    lines, expected = history(other), history(reference)
    assert len(lines) == len(expected) == steps
    assert sum("train/epoch_loss" in line for line in expected) == EPOCHS
    for line, wanted in zip(lines, expected, strict=True):
        for name in ("step", "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss"):
            assert (name in line) == (name in wanted)
            if name in wanted:
                assert line[name] == pytest.approx(wanted[name], rel=bound), (name, line["step"])

    # the same weights, averaged weights and optimizer moments
    for part in ("model", "ema"):
        assert relative_difference(weights(reference, steps, part), weights(other, steps, part)) < bound, part
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        assert relative_difference(moments(reference, steps, kind), moments(other, steps, kind)) < bound, kind


def test_the_runs_did_train(runs):
    output_dir = runs["float32", "1x8x1", 19]
    lines = [line["train/epoch_loss"] for line in history(output_dir) if "train/epoch_loss" in line]
    assert lines[-1] < 0.95 * lines[0]
