"""One config run in many batch layouts: for the test of invariance and for its benchmark."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from harness.configs import crop_of, of_kind, tiny_config, write_config, write_pictures
from harness.several_runs import run_configs

LAYOUTS = {  # global batch -> processes x micro-batch x accumulation steps; the first is the reference of the others
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
PRECISIONS = ("float32", "float64", "bf16", "compiled")  # compiled: float32, against float32 that is not
COMPILED = [(1, 8, 1), (1, 2, 4), (2, 2, 2)]


class Case(NamedTuple):
    precision: str
    layout: tuple[int, int, int]
    images: int
    kind: str = "unconditional"
    shard: bool = False
    crop: str = ""  # empty: that of its kind
    epochs: int = 2

    @property
    def batch(self) -> int:
        processes, micro, steps = self.layout
        return processes * micro * steps

    @property
    def reference(self) -> "Case":
        precision = "float32" if self.precision == "compiled" else self.precision
        return self._replace(precision=precision, layout=LAYOUTS[self.batch][0], shard=False)

    @property
    def updates(self) -> int:
        return self.epochs * -(-self.images // self.batch)

    def __str__(self) -> str:
        options = ("-sharded" if self.shard else "") + (f"-{self.crop}" if self.crop else "")
        return f"{self.kind}-{self.precision}-{'x'.join(map(str, self.layout))}-{self.images}{options}"


def every_case(precision: str, kind: str = "unconditional") -> list[Case]:
    """Each layout but the references, with each tail of its batch; few of the compiled ones, which take long."""
    if precision == "compiled":
        return [Case(precision, layout, 19, kind) for layout in COMPILED]
    return [
        Case(precision, layout, images, kind)
        for batch in LAYOUTS
        for layout in LAYOUTS[batch][1:]
        for images in TAILS[batch]
    ]


def run_cases(base: Path, cases: Iterable[Case], backend: str = "inductor") -> dict[Case, Path]:
    """Run these and their references, one after another, on each number of processes.

    Args:
        backend: what compiles those that are to be compiled, as `accelerate launch` names it.

    Returns:
        The output folder of each.
    """
    cases = sorted({*cases, *(case.reference for case in cases)})
    for processes, compiled in sorted({(case.layout[0], case.precision == "compiled") for case in cases}):
        files = {precision: [] for precision in PRECISIONS}
        for case in cases:
            if (case.layout[0], case.precision == "compiled") == (processes, compiled):
                files[case.precision].append(write_config(base / f"{case}.yaml", _config(base, case)))
        environment = {"ACCELERATE_DYNAMO_BACKEND": backend.upper()} if compiled else {}
        files["float32"] += files.pop("compiled")
        run_configs(processes, files, base / "log", **environment)
    return {case: base / str(case) for case in cases}


def _config(base: Path, case: Case) -> dict:
    _, micro, steps = case.layout
    pictures = write_pictures(base / f"{case.kind}-{case.images}", case.images, (10, 8), case.kind)
    return tiny_config(
        pictures,
        base / str(case),
        **of_kind(case.kind, pictures, whole=True),
        data__crop=case.crop or crop_of(case.kind),
        data__random_flip=True,
        training__micro_batch_size=micro,
        training__gradient_accumulation_steps=steps,
        training__num_epochs=case.epochs,
        training__snr_gamma=5.0,
        training__shard=case.shard,
        lr_scheduler={"name": "cosine", "warmup_steps": 2},
    )
