"""Kill a run at random instants, again and again, and compare what comes out with an undisturbed run, bit for bit.

python tests/benchmarks/crash.py               # 100 kills, about three minutes on two CPU cores
python tests/benchmarks/crash.py --kills 5 --kind classes
python tests/benchmarks/crash.py --kills 10 --kind lora --shapes
python tests/benchmarks/crash.py --kills 20 --sharded         # two processes, one of them killed or both
"""

import contextlib
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

from environment import FOLDER, parser

from table import head, row

from finetune.run import checkpoint
from harness.compare import differing, history
from harness.configs import KINDS, crop_of, evaluated_config, of_kind, write_config, write_pictures
from harness.processes import Outcome, start, start_two
from harness.shapes import SHAPES, write_shapes


def where(run: Path, updates: int) -> str:
    """How far a run of so many updates got, by what it left."""
    if any((run / f"{export}{end}").exists() for export in ("pipeline", "lora") for end in ("", ".tmp")):
        return "export and after"
    if any(run.glob(".checkpoint.partial")):
        return "saving"
    if not (run / "metrics.jsonl").exists():
        return "starting"
    steps = [line["step"] for line in history(run)] if (run / "metrics.jsonl").read_text().endswith("\n") else [-1]
    done = max(steps, default=0)
    if done == updates:
        return "after the last update"
    return "before the first update" if done <= 0 else f"updates {done // 10 * 10 + 1:02} to {done // 10 * 10 + 10}"


def main(kills: int, epochs: int, seed: int, kind: str, shaped: bool, sharded: bool) -> int:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every purge, and resuming purges
    draw, base = random.Random(seed), Path(FOLDER.name)
    updates = 3 * epochs  # of 8 + 8 + 1 images
    images, log = base / "pictures", base / "log"
    if shaped:
        options = of_kind(kind, write_shapes(images, 19, kind), whole=True)
        options |= {"data__buckets": SHAPES, "data__crop": crop_of(kind), "data__random_flip": True}
    else:
        options = of_kind(kind, write_pictures(images, 19, kind=kind), whole=True)
    if sharded:
        options |= {"training__shard": True, "training__micro_batch_size": 2}

    def config_of(run: Path) -> Path:
        config = evaluated_config(images, run, training__num_epochs=epochs, **options)
        return write_config(run.with_suffix(".yaml"), config)

    def attempt(file: Path, seconds: float) -> Outcome | None:
        """How a run ended, or None if it was killed after so many seconds."""
        running = (start_two if sharded else start)("--config", file, folder=log)
        first, *others = draw.sample(running, 2) if sharded else [running]
        try:
            outcome = first.wait(seconds)
        except TimeoutError:
            for other in others:
                with contextlib.suppress(TimeoutError):
                    other.wait(draw.choice([0, 120]))  # killed with it, or left to notice
            return None
        return max([outcome, *(other.wait(120) for other in others)])

    started = time.monotonic()
    undisturbed = attempt(config_of(base / "undisturbed"), 120)
    assert undisturbed is not None
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    whole = time.monotonic() - started
    killed, runs, broken, places = 0, 0, [], Counter()
    while killed < kills:
        runs += 1
        run = base / f"run-{runs}"
        file = config_of(run)
        while True:
            outcome = attempt(file, draw.uniform(0, 1.2 * whole) if killed < kills else 120)
            if outcome is not None:
                break
            killed += 1
            places[where(run, updates)] += 1
            broken += [f"run {runs}: {each}" for each in run.glob("checkpoint-*") if checkpoint.flaw(each)]
        ended = (
            [f"exit code {outcome.returncode}"] if outcome.returncode else differing(base / "undisturbed", run, updates)
        )
        broken += [f"run {runs}: {difference}" for difference in ended]
    head(f"{kills} kills over {runs} runs of {updates} updates ({whole:.1f} s each, undisturbed)", "")
    for place, count in sorted(places.items()):
        row(f"killed: {place}", str(count))
    same = runs - len({problem.split(":")[0] for problem in broken})
    row("runs that ended bit for bit as the undisturbed one", f"{same} of {runs}")
    for problem in broken:
        row(problem, "")
    return 1 if broken else 0


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kind", choices=KINDS, default="unconditional", help="the kind of model")
    options.add_argument("--shapes", action="store_true", help="pictures of many shapes, not squares")
    options.add_argument("--sharded", action="store_true", help="two processes that hold a part of the model each")
    arguments = options.parse_args()
    with FOLDER:
        kills, epochs = (1, 2) if arguments.short else (arguments.kills, 10)
        sys.exit(main(kills, epochs, arguments.seed, arguments.kind, arguments.shapes, arguments.sharded))
