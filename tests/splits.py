"""One config run in many splits, and how far apart the runs end: for the test of invariance and for its benchmark."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from tiny import history, launch, tiny_config, weights, write_config, write_pictures

EPOCHS = 3
SPLITS = {  # global batch -> processes x micro-batch x accumulation steps; the first is what others are held against
    8: [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 2, 2), (2, 1, 4)],
    12: [(1, 12, 1), (1, 3, 4), (2, 3, 2)],
}
TAILS = {  # global batch -> images: the last window has
    8: {
        17: "1 image, fewer than processes",
        15: "B - 1 images",
        19: "3 images, which micro-batches of 2 do not divide",
        5: "all images, fewer than B",
    },
    12: {19: "7 images, which micro-batches of 3 do not divide"},
}
PRECISIONS = ("float32", "float64", "bf16")


class Case(NamedTuple):
    precision: str
    split: tuple[int, int, int]
    images: int

    @property
    def batch(self) -> int:
        processes, micro, steps = self.split
        return processes * micro * steps

    @property
    def reference(self) -> "Case":
        return self._replace(split=SPLITS[self.batch][0])

    @property
    def updates(self) -> int:
        return EPOCHS * -(-self.images // self.batch)

    def __str__(self) -> str:
        return f"{self.precision}-{'x'.join(map(str, self.split))}-{self.images}"


def every_case(precision: str) -> list[Case]:
    """Each split but the references, with each tail of its batch."""
    return [
        Case(precision, split, images) for batch in SPLITS for split in SPLITS[batch][1:] for images in TAILS[batch]
    ]


def run_cases(base: Path, cases: Iterable[Case]) -> dict[Case, Path]:
    """Run these and their references, in one launch for each number of processes and mixed precision.

    Returns:
        The output folder of each.
    """
    cases = sorted({*cases, *(case.reference for case in cases)})
    launches: dict[tuple, dict[bool, list[Path]]] = {}
    for case in cases:
        processes, micro, steps = case.split
        config = tiny_config(
            write_pictures(base / str(case.images), case.images, (10, 8)),
            base / str(case),
            data__crop="random",
            data__random_flip=True,
            training__micro_batch_size=micro,
            training__gradient_accumulation_steps=steps,
            training__num_epochs=EPOCHS,
            training__snr_gamma=5.0,
            lr_scheduler={"name": "cosine", "warmup_steps": 2},
        )
        mixed_precision = "bf16" if case.precision == "bf16" else "no"
        files = launches.setdefault((processes, mixed_precision), {False: [], True: []})
        files[case.precision == "float64"].append(write_config(base / f"{case}.yaml", config))
    for (processes, mixed_precision), files in launches.items():
        double = ["--float64", *files[True]] if files[True] else []
        outcome = launch(
            *files[False], *double, processes=processes, mixed_precision=mixed_precision, script="tests/several.py"
        )
        assert outcome.returncode == 0, outcome.stderr[-3000:]
    return {case: base / str(case) for case in cases}


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
    """AdamW's `exp_avg`, `exp_avg_sq` or `step` of every parameter."""
    state = torch.load(output_dir / f"checkpoint-{step}" / "optimizer.bin", weights_only=True)["state"]
    return {str(index): tensors[kind] for index, tensors in state.items()}


def differences(one: Path, other: Path, step: int) -> dict[str, float]:
    """How far apart two runs are, by name: the largest relative difference of any update, and of the state at the end.

    Raises:
        AssertionError: if they did not log the same figures at the same steps.
    """
    lines, others = history(one), history(other)
    found = {}
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "train/epoch_loss"):
        assert [name in line for line in lines] == [name in line for line in others]
        pairs = [(a[name], b[name]) for a, b in zip(lines, others, strict=True) if name in a]
        found[name] = max(abs(a - b) / abs(a) if a != b else 0.0 for a, b in pairs)
    for part in ("model", "ema"):
        found[part] = relative_difference(weights(one, step, part), weights(other, step, part))
    for kind in ("exp_avg", "exp_avg_sq", "step"):
        found[kind] = relative_difference(moments(one, step, kind), moments(other, step, kind))
    return found
