"""The short form of each benchmark runs and prints all of its rows. Figures need a quiet machine."""

import os
import re

import datasets
import pytest

from harness.configs import ROOT
from harness.processes import run
from harness.simulated_losses import FALLS

PASSES = [
    f"{how} decoding, cores: {cores}" for how in ("full", "reduced") for cores in (1, len(os.sched_getaffinity(0)))
]
ROWS = {  # command -> the first cell of each row that it prints
    "speed --short": [
        *(f"8 images a micro-batch, N = {steps}" for steps in (1, 4)),
        *("UNet of 0.045 M at 8 px, 16 images", "configs/digits.yaml, 4 x 16 images"),
        "UNet of 0.045 M at 8 px, 16 images, by class",
        *("bf16, UNet of 0.045 M at 8 px, 4 images", "channels-last, float32"),
        *("fused AdamW", "EMA, foreach", "EMA, foreach in one pass"),
    ],
    "speed --compile --short": ["the first pass", "UNet of 0.045 M at 8 px, 16 images"],
    "checkpointing --short": [
        "a save in two parts over one by one process",
        *("command to first update over bare imports and model", "resumed at update 1 over fresh"),
        *("a save over a plain write and sync", "saves at the default interval, updates of 0.4 s"),
    ],
    "classes --short": [
        "1.0",
        *("from the base, class rows N(0, 1)", "from the base, all rows zero", "from scratch", "4 draws"),
        *("0", "1", "2", "3", "4"),
    ],
    "crash --short": ["killed: ...", "runs that ended bit for bit as the undisturbed one"],
    "crash --short --sharded": ["killed: ...", "runs that ended bit for bit as the undisturbed one"],
    "invariance --short": ["1 x 2 x 4"],
    "latents --short": [
        *("16 latents of 8 x 8", "encoded images over random latents"),
        *("images/s gained, LoRA", "images/s gained, all weights"),
    ],
    "loader --short": [
        *(f"64 px from the cache, images{how}" for how in (" alone", ", cropped and flipped at random")),
        *("the same with noise and timesteps", "the same through two workers"),
        *("own memory, from 20 to 400 images read", "mapped files, which the system drops when it needs room"),
        *(f"first pass over photographs of 0.3 megapixels, {how}" for how in PASSES),
        *("next start on the same 8 photographs", "an update on photographs over the bare loop's"),
        "next start on 400 images in parquet",
    ],
    "loss_signal --short": [
        "4 images x 2, independent timesteps, train/loss",
        *("64 images, train/loss", "64 images, train/loss_smoothed"),
        *("data", "compute", "update", "logging"),
        *("uniform", "stratified"),
        *("4", "8", "16", "64"),
        *("from step to step", "around its mean"),
        *FALLS,
        *("digits, from the base, 6 updates", "from scratch, 6 updates"),
        *("64", "16384"),
    ],
    "memory --short": [
        *("gradient checkpointing", "saves, or none", "training.shard"),
    ],
    "scale --short": [
        *("100,000, full", "100,000, blocks"),
        *("timesteps, stratified", "timesteps, uniform", "dropped conditions"),
        "mean positions between images adjacent in the source",
        *(f"images of an update of {size} with another of their span of 64" for size in (64, 256, 1024)),
        *(f"variance of a class's images in {size} in a row, of a sorted source" for size in ("64", "1,024", "16,384")),
        *("full", "blocks", "full, sorted by class", "blocks, sorted by class"),
        *("full, 100 of them", "blocks, 2,000 of them"),
    ],
    "shapes --short": [
        *("1", "3", "5", "7"),
        *("16, 4, 1", "16, 4, 2"),
        *("512, 64", "1024, 64", "512, 32", "512, 8"),
        "32 px, 8 images in micro-batches of 4",
        *("4 x 4 x 1", "4 x 2 x 2", "8 x 4 x 2"),
    ],
    "shapes --compile --short": ["UNet of 0.02 M"],
    "supervisors --short": ["python train.py"],
}
SHARED = {"bare", "environment", "table"}  # by the benchmarks


def test_every_benchmark_is_listed():
    files = {path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")}
    assert files == {command.split()[0] for command in ROWS} | SHARED


def rows(printed: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    tables = re.findall(r"^\|[-:|]+\|\n((?:\|.*\n)+)", printed, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for table in tables for line in table.splitlines()]


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.parametrize("command", ROWS)
def test_short_form_prints_every_row(command, tmp_path):
    name, *arguments = command.split()

    def before():
        os.chdir(ROOT)
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    script = f"tests/benchmarks/{name}.py"
    outcome = run(*arguments, folder=tmp_path, before=before, seconds=900, script=script)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found = rows(outcome.stdout)
    assert [re.sub("(?<=^killed: ).*", "...", first) for first, *_ in found] == ROWS[command]
    for first, *cells in found:
        assert re.search(r"\d|not known yet", " ".join(cells)), first
        assert "nan" not in cells, first
    if name == "crash":
        assert re.fullmatch(r"(\d+) of \1", found[-1][1])
