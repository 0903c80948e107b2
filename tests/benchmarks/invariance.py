"""Largest relative differences of one run over all batch layouts, lengths of the last window and precisions.

python tests/benchmarks/invariance.py            # about six minutes on two CPU cores, half of them to compile
python tests/benchmarks/invariance.py --short    # one layout: a smoke test
"""

from pathlib import Path

from environment import FOLDER, parser

from table import head, row

from harness import shapes
from harness.compare import differences, slots
from harness.layouts import TAILS, Case, every_case, run_cases

BOTH = ("float64", "float32")
KINDS_OF_SHAPES = {"unconditional": BOTH, "text": BOTH, "sdxl": ("float64",), "lora": ("float64",)}
COLUMNS = {"loss": "train/loss", "gradient norm": "train/grad_norm", "weights": "model", "averaged": "ema"}


def main(short: bool) -> None:
    cases = [case for precision in ("float64", "float32", "bf16", "compiled") for case in every_case(precision)]
    cases += [case for precision in ("float64", "float32") for case in every_case(precision, "classes")]
    cases += [
        Case(precision, layout, images, kind, shard=True)
        for precision in ("float64", "float32")
        for kind in ("unconditional", "classes", "text")
        for layout in ((2, 2, 2), (2, 1, 4))
        for images in TAILS[8]
    ]
    cases = cases[:1] if short else [case._replace(epochs=3) for case in cases]
    runs = run_cases(Path(FOLDER.name), cases)
    head("processes x micro-batch x steps", "kind", "precision", "runs", *COLUMNS)
    table(runs, cases)
    if not short:
        shaped = [
            shapes.Case(layout, images, precision, kind, epochs=3)
            for kind, precisions in KINDS_OF_SHAPES.items()
            for precision in precisions
            for layout in shapes.LAYOUTS[1:]
            for images in shapes.TAILS
        ]
        head("five shapes, with attention", "kind", "precision", "runs", *COLUMNS)
        table(shapes.run_shaped(Path(FOLDER.name, "shapes"), shaped), shaped)


def table(runs: dict, cases: list) -> None:
    """A row for each layout, precision and kind."""
    for group in dict.fromkeys(map(grouped, cases)):
        same, (kind, precision, layout, sharded) = [case for case in cases if grouped(case) == group], group
        kind += ", sharded" if sharded else ""
        row(" x ".join(map(str, layout)), kind, precision, str(len(same)), *largest(runs, same))


def grouped(case: Case | shapes.Case) -> tuple:
    return case.kind, case.precision, case.layout, getattr(case, "shard", False)


def largest(runs: dict, cases: list) -> list[str]:
    """Per column, the largest relative difference from the reference over the tails; what went in has to be equal."""
    found = []
    for case in cases:
        assert slots(runs[case]) == slots(runs[case.reference])
        found.append(differences(runs[case.reference], runs[case], case.updates))
    return [f"{max(each[name] for each in found):.1e}" for name in COLUMNS.values()]


if __name__ == "__main__":
    with FOLDER:
        main(parser(__doc__).parse_args().short)
