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

from splits import REFERENCE, SPLITS, TAILS, Case, differences, run_cases, slots, steps_of  # noqa: E402

COLUMNS = {"loss": "train/loss", "gradient norm": "train/grad_norm", "weights": "model", "averaged": "ema"}


def main(short: bool) -> None:
    precisions = ["float32"] if short else ["float64", "float32", "bf16"]
    tails = [5] if short else list(TAILS)
    splits = [split for split in SPLITS if not short or split in (REFERENCE, "1 x 2 x 4")]
    cases = [Case(precision, split, images) for precision in precisions for split in splits for images in tails]
    with tempfile.TemporaryDirectory() as folder:
        runs = run_cases(Path(folder), cases)
        print(f"Largest over {len(tails)} tails (last windows of {', '.join(TAILS[images] for images in tails)}):\n")
        print(
            f"| processes x micro-batch x steps | precision | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}"
        )
        for precision in precisions:
            for split in splits:
                if split != REFERENCE:
                    figures = " | ".join(largest(runs, precision, split, tails))
                    print(f"| {split} | {precision} | {figures} |")


def largest(runs: dict[Case, Path], precision: str, split: str, tails: list[int]) -> list[str]:
    """Per column, the largest relative difference from the reference over the tails; what went in has to be equal."""
    found = []
    for images in tails:
        reference, other = runs[Case(precision, REFERENCE, images)], runs[Case(precision, split, images)]
        assert slots(other) == slots(reference)
        found.append(differences(reference, other, steps_of(images)))
    return [f"{max(each[name] for each in found):.1e}" for name in COLUMNS.values()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    main(parser.parse_args().short)
