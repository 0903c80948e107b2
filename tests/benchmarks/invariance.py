"""How far one run ends apart in its splits: all splits x tails x precisions, largest relative differences.

python tests/benchmarks/invariance.py            # about three minutes on two CPU cores
python tests/benchmarks/invariance.py --short
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse  # noqa: E402
import tempfile  # noqa: E402

from splits import Case, differences, every_case, run_cases, slots  # noqa: E402

COLUMNS = {"loss": "train/loss", "gradient norm": "train/grad_norm", "weights": "model", "averaged": "ema"}


def main(short: bool) -> None:
    cases = [case for precision in ("float64", "float32", "bf16") for case in every_case(precision)]
    if short:
        cases = cases[:1]
    with tempfile.TemporaryDirectory() as folder:
        runs = run_cases(Path(folder), cases)
        print(f"| processes x micro-batch x steps | precision | runs | {' | '.join(COLUMNS)} |")
        print("|---|---|" + (1 + len(COLUMNS)) * "---:|")
        for precision, split in dict.fromkeys((case.precision, case.split) for case in cases):
            same = [case for case in cases if (case.precision, case.split) == (precision, split)]
            figures = " | ".join(largest(runs, same))
            print(f"| {' x '.join(map(str, split))} | {precision} | {len(same)} | {figures} |")


def largest(runs: dict[Case, Path], cases: list[Case]) -> list[str]:
    """Per column, the largest relative difference from the reference over the tails; what went in has to be equal."""
    found = []
    for case in cases:
        assert slots(runs[case]) == slots(runs[case.reference])
        found.append(differences(runs[case.reference], runs[case], case.updates))
    return [f"{max(each[name] for each in found):.1e}" for name in COLUMNS.values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    main(parser.parse_args().short)
