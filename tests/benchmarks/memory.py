"""How much memory training takes at its peak, and how much `--check` says that it will take.

    python tests/benchmarks/memory.py            # about eight minutes on two CPU cores
    python tests/benchmarks/memory.py --short

Each figure is the peak resident memory of an interpreter of its own, with the C allocator's default settings. It is
read from /proc while the process runs: the peak that `wait4` returns is at least that of the process which started it.
"""

import re
import time
from pathlib import Path

from environment import FOLDER, ROOT, parser

from bare import run_config, unet_config
from table import head, row

from harness.configs import write_config
from harness.processes import start_several

WIDE = {**unet_config((128, 256, 352), 8), "layers_per_block": 8}  # 106 M weights, in many blocks
MICRO_STEPS = 200  # the peak grows for so long, since the C allocator's heap does


def read_peak(process: int) -> float:
    """MB that a running process has held at most; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def peak(
    short: bool, file: Path, *overrides: str, processes: int = 1, log: Path | None = None, lines: int = 0
) -> tuple[float, str]:
    """MB at the peak of a process of a run of train.py, the largest, and what the first one printed.

    Args:
        short: in forks, which start at once, instead of new interpreters.
        log: the processes are killed as soon as this file has so many lines.
    """
    arguments, folder = ("--config", file, *overrides), Path(FOLDER.name, "log")
    running = start_several(processes, *arguments, folder=folder, fresh=not short)
    last = dict.fromkeys(running, 0.0)  # the last reading is the peak: before the new interpreter it is this one's
    while any(process.poll() is None for process in running):
        last |= {process: found for process in running if (found := read_peak(process.pid))}
        if log is not None and log.exists() and len(log.read_text().splitlines()) >= lines:
            for process in running:
                process.end()
            return max(last.values()), running[0].printed()
        time.sleep(0.02)
    outcomes = [process.wait() for process in running]
    assert {outcome.returncode for outcome in outcomes} == {0}, outcomes[0].stderr[-3000:]
    return max(last.values()), outcomes[0].stdout


def planned(short: bool, file: Path, *overrides: str, processes: int = 1) -> float:
    """MB that `--check` announces."""
    _, printed = peak(short, file, *overrides, "--check", processes=processes)
    return float(re.search(r"^Memory: about (\d+) MB", printed, re.MULTILINE)[1])


def compare_shares(short: bool) -> None:
    """Two processes, of which each holds all, or its share. To the end of the export, with an average
    and saves."""
    network, found = unet_config((8, 16), 8) if short else WIDE, {}
    file = config_file("shared", network, 2, 2, 2, images=8, logging__tracker=None)
    head("peak memory of one of two processes, MB", "in the plan", "measured", "plan / measured", "limit")
    shares = ("each holds all", "false"), ("training.shard", "true")
    for what, shard in shares[-1:] if short else shares:
        overrides = f"output_dir={FOLDER.name}/shared-{shard}", f"training.shard={shard}"
        plan = planned(short, file, *overrides, processes=2)
        found[shard], _ = peak(short, file, *overrides, processes=2)
        row(what, f"{plan:.0f}", f"{found[shard]:.0f}", plan / found[shard], "0.85 to 1.15")
    if short:
        return
    head("peak memory of one of two processes")
    row(
        "training.shard, or not",
        f"{found['true']:.0f} : {found['false']:.0f} MB",
        found["true"] / found["false"],
        "0.65",
    )


def config_file(name: str, unet: dict, micro: int, steps: int, updates: int, images: int = 64, **changes) -> Path:
    sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": steps, "max_train_steps": updates}
    config = run_config(name, unet, images, training=sizes, **{"checkpoint__every_steps": 1000} | changes)
    return write_config(Path(FOLDER.name, f"{name}.yaml"), config.model_dump(mode="json", exclude_defaults=True))


def compare_plans(short: bool) -> None:
    """Runs with all that happens in one: held-out images, samples, TensorBoard, an average, the export."""
    evaluated = {"data__validation_fraction": 0.1, "samples": {"count": 8, "inference_steps": 2}}
    steps = 2 if short else 4
    small, updates = unet_config((8, 16)) if short else unet_config(), 2 if short else MICRO_STEPS // steps
    heavy = unet_config((8, 16), 8) if short else unet_config((128, 256, 352), 8)
    again = {"model__gradient_checkpointing": True}
    digits = [f"output_dir={FOLDER.name}/digits", f"training.max_train_steps={updates}"]
    head("peak memory of a run, MB", "in the plan", "measured", "plan / measured", "limit")
    runs = (
        ("configs/digits.yaml, micro-batch of 16", ROOT / "configs/digits.yaml", digits),
        (
            "64 px, micro-batch of 2",
            config_file("p64", small | {"sample_size": 64}, 2, steps, updates, **evaluated),
            [],
        ),
        ("mostly weights", config_file("heavy", heavy, 2, steps, updates, **evaluated), []),
        ("gradient checkpointing", config_file("again", small, 8, steps, updates, **evaluated, **again), []),
    )
    for what, file, overrides in runs[-1:] if short else runs:
        plan, (run, _) = planned(short, file, *overrides), peak(short, file, *overrides)
        row(what, f"{plan:.0f}", f"{run:.0f}", plan / run, "0.85 to 1.15")


def compare_pairs(short: bool) -> None:
    """Runs that differ in one setting."""
    plain = {"ema__enabled": False, "logging__tracker": None}
    head("peak memory")

    def compare(what: str, one: float, other: float, *limit: str) -> None:
        row(what, f"{one:.0f} : {other:.0f} MB", one / other, *limit)

    if not short:
        unet, batch, micro = unet_config(), 256, 32
        small, _ = peak(short, config_file("small", unet, 4, 1, MICRO_STEPS, images=256, **plain))
        large, _ = peak(
            short, config_file("large", unet, 4, batch // 4, -(-4 * MICRO_STEPS // batch), images=256, **plain)
        )
        compare(f"global batch {batch} over 4, micro-batches of 4", large, small, "1.05")
        kept, _ = peak(short, config_file("kept", unet, micro, 1, 5, **plain))
        again, _ = peak(
            short, config_file("recomputed", unet, micro, 1, 5, model__gradient_checkpointing=True, **plain)
        )
        compare(f"gradient_checkpointing, micro-batch of {micro}", again, kept)
    unet, found = unet_config((8, 16), 8) if short else unet_config((128, 256, 352), 8), []
    for name, every in (("saved", 1), ("unsaved", 1000)):
        file = config_file(name, unet, 1, 1, 1000, images=8, checkpoint__every_steps=every, **plain)
        found.append(peak(short, file, log=Path(FOLDER.name, name, "metrics.jsonl"), lines=3)[0])
    compare("saves, or none", *found)


def main() -> None:
    short = parser(__doc__).parse_args().short
    compare_plans(short)
    compare_pairs(short)
    compare_shares(short)


if __name__ == "__main__":
    with FOLDER:
        main()
