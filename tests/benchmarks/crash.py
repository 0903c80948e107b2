"""Kill a run at random instants, again and again, and compare what comes out with the undisturbed run, to the last bit.

python tests/benchmarks/crash.py               # 100 kills, about three minutes on two CPU cores
python tests/benchmarks/crash.py --kills 5
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[0:1] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse  # noqa: E402
import logging  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402

import matplotlib.backends.backend_agg  # noqa: E402 - once here, and not in every child
import matplotlib.figure  # noqa: E402, F401

from finetune import checkpoint  # noqa: E402
from test_kill import full_config  # noqa: E402
from tiny import differing, history, run_in_child, write_pictures  # noqa: E402

EPOCHS, STEPS = 10, 30  # of 8 + 8 + 1 images


def long_config(images: Path, output_dir: Path) -> dict:
    config = full_config(images, output_dir)
    config["training"]["num_epochs"] = EPOCHS
    return config


def outcome(pid: int, seconds: float) -> int | None:
    """Exit status of a child that ended within so many seconds; None for one that had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def where(run: Path) -> str:
    """How far a run got, by what it left."""
    if (run / "pipeline").exists() or (run / "pipeline.tmp").exists():
        return "export and after"
    if any(run.glob(".checkpoint.partial")):
        return "saving"
    if not (run / "metrics.jsonl").exists():
        return "starting"
    steps = [line["step"] for line in history(run)] if (run / "metrics.jsonl").read_text().endswith("\n") else [-1]
    done = max(steps, default=0)
    if done == STEPS:
        return "after the last update"
    return "before the first update" if done <= 0 else f"updates {done // 10 * 10 + 1:02} to {done // 10 * 10 + 10}"


def main(kills: int, seed: int) -> int:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge, and purges are what is wanted
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        images = write_pictures(base / "pictures", 19)
        start = time.monotonic()
        assert outcome(run_in_child(long_config(images, base / "run"), base / "run.yaml"), 120) == 0
        whole = time.monotonic() - start
        killed, runs, broken, places = 0, 0, [], Counter()
        while killed < kills:
            runs += 1
            config = long_config(images, base / f"run-{runs}")
            run = Path(config["output_dir"])
            while True:
                patience = draw.uniform(0, 1.2 * whole) if killed < kills else 120
                status = outcome(run_in_child(config, base / "config.yaml"), patience)
                if status is not None:
                    break
                killed += 1
                places[where(run)] += 1
                broken += [str(each) for each in run.glob("checkpoint-*") if checkpoint.flaw(each)]
            differences = [f"exit status {status}"] if status else differing(base / "run", run, STEPS)
            broken += [f"run {runs}: {difference}" for difference in differences]
    print(f"| {kills} kills over {runs} runs of {STEPS} updates ({whole:.1f} s each, undisturbed) | |\n|---|---|")
    for place, count in sorted(places.items()):
        print(f"| killed: {place} | {count} |")
    print(f"| runs that ended as the undisturbed one, to the bit | {runs - len(set(broken))} of {runs} |")
    for problem in broken:
        print(f"| {problem} | |")
    return 1 if broken else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed))
