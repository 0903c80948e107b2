"""What runs leave behind, and how far apart two of them are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor

from finetune.config.load import load_config
from finetune.models.load import outline_kind
from finetune.run import checkpoint
from harness.checkpoints import assembled, is_sharded

TIMED = ("time/", "train/images_per_second")
TIMED_TAGS = ("time/", "progress/images_per_second")


def weights(output_dir: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    """Weights of a checkpoint, sharded or not: `model`, or `ema`."""
    folder = output_dir / f"checkpoint-{step}"
    return assembled(folder, part) if is_sharded(folder) else load_file(folder / f"{part}.safetensors")


def moments(output_dir: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """AdamW's `exp_avg`, `exp_avg_sq` and `step` of every parameter, by its number."""
    folder, names = output_dir / f"checkpoint-{step}", ("exp_avg", "exp_avg_sq", "step")
    if is_sharded(folder):
        config = load_config(output_dir / "config.yaml")
        network = outline_kind(config.model, config.data.resolution).network
        order = [weight for weight, _ in network.named_parameters()]
        found = {name: assembled(folder, name) for name in names}
        known = [weight for weight in order if weight in found["step"]]
        known += sorted(found["step"].keys() - {*order})  # of an embedding of classes, which comes last
        return {name: {str(index): found[name][weight] for index, weight in enumerate(known)} for name in names}
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    return {name: {str(index): tensors[name] for index, tensors in state.items()} for name in names}


def history(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def newest_step(output_dir: Path) -> int:
    """The step of the last complete line of metrics.jsonl, while it is being written; 0 if there is none."""
    text = (output_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def untimed(output_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without times and rates."""
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in history(output_dir)]


def board(folder: Path) -> EventAccumulator:
    """All that TensorBoard knows of one of its runs; everything in it is a tensor."""
    events = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "images": 0, "text": 0})
    events.Reload()
    return events


def curves(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves of a run: (step, value) of every scalar, without times and rates.

    Their names are TensorBoard's, run and tag: `train/loss` is the smoothed one (see finetune.run.board).
    """
    found = {}
    for folder in sorted((output_dir / "tensorboard").iterdir()):
        if folder.is_dir():
            events = board(folder)
            try:
                tags = events.PluginTagToContent("scalars")
            except KeyError:  # of a run that was opened and has none
                continue
            for tag in tags:
                if not tag.startswith(TIMED_TAGS):
                    points = [(point.step, make_ndarray(point.tensor_proto).item()) for point in events.Tensors(tag)]
                    found[f"{folder.name}/{tag}"] = points
    return found


def slots(output_dir: Path) -> list:
    """(epoch, position, image, digest of pixels, noise and timestep) of every real slot of a run of `several_runs`."""
    found = [json.loads(line) for file in output_dir.glob("slots-*.jsonl") for line in file.read_text().splitlines()]
    return sorted(found)


def valid_checkpoints(output_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which have to be valid, in a folder without half-written files."""
    saved = list(output_dir.glob("checkpoint-*"))
    assert [checkpoint.flaw(folder) for folder in saved] == [None] * len(saved)
    assert [path for path in output_dir.rglob("*") if path.name.endswith((".partial", ".pruned", ".tmp"))] == []
    return sorted(int(folder.name.split("-")[1]) for folder in saved)


def unequal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same to the last bit and of one type, or that only one of the two has."""
    shared = one.keys() & other.keys()
    same = {name for name in shared if one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])}
    return sorted((one.keys() | other.keys()) - same)


def differing(one: Path, other: Path, step: int) -> list[str]:
    """In what two runs are not the same to the last bit: weights, averages, where the run is and its statistics,
    TensorBoard's curves, metrics.jsonl."""
    found = [part for part in ("model", "ema") if unequal(weights(one, step, part), weights(other, step, part))]
    first, second = run_state(one, step), run_state(other, step)
    for saved in (first, second):  # how long it took, and where it branched off
        saved["state"] |= {"seconds": 0.0, "branches": []}
    found += [part for part in ("state", "meters") if first[part] != second[part]]
    return found + [read.__name__ for read in (curves, untimed) if read(one) != read(other)]


def run_state(output_dir: Path, step: int) -> dict[str, Any]:
    """A checkpoint's own JSON: where the run is, its statistics, its identity and its config."""
    return json.loads((output_dir / f"checkpoint-{step}" / checkpoint.RUN_STATE).read_text())


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors as one vector.

    Not tensor by tensor: the gradient of an attention key's bias is zero in exact arithmetic, since the softmax cancels
    it, and Adam makes steps of full size of its rounding errors.
    """
    assert one.keys() == other.keys()
    flat = [torch.cat([tensors[key].double().flatten() for key in one]) for tensors in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


def differences(one: Path, other: Path, step: int) -> dict[str, float]:
    """How far apart two runs are, by name: the largest relative difference of any update, and of the state at the end.

    Raises:
        AssertionError: if they did not log the same figures at the same steps.
    """
    lines, others = history(one), history(other)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    found = {}
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss"):
        assert [name in line for line in lines] == [name in line for line in others]
        pairs = [(a[name], b[name]) for a, b in zip(lines, others, strict=True) if name in a]
        found[name] = max(abs(a - b) / abs(a) if a != b else 0.0 for a, b in pairs)
    for part in ("model", "ema"):
        found[part] = relative_difference(weights(one, step, part), weights(other, step, part))
    ours, theirs = moments(one, step), moments(other, step)
    return found | {name: relative_difference(ours[name], theirs[name]) for name in ours}
