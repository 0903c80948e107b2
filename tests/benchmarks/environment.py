"""Imported first by every benchmark: where imports and caches lie, and the command line that all of them share."""

import argparse
import gc
import os
import platform
import sys
import tempfile
from pathlib import Path

gc.disable()  # until the command line is read: see `finetune.core.launcher.prepare_for_imports`
ROOT = Path(__file__).parents[2]
FOLDER = tempfile.TemporaryDirectory(prefix="finetune-benchmark-")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# Before `datasets` and `huggingface_hub` are imported, which read these once.
os.environ |= {"HF_HOME": FOLDER.name, "HF_DATASETS_CACHE": f"{FOLDER.name}/datasets", "HF_HUB_OFFLINE": "1"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def parser(documentation: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, described by the first line of its docstring, after all imports."""
    gc.freeze()
    gc.enable()
    made = argparse.ArgumentParser(description=documentation.splitlines()[0])
    made.add_argument("--short", action="store_true", help="the smallest sizes, to see that all of it runs")
    return made


def machine() -> str:
    """What figures were measured on."""
    import torch

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}, one thread a process, torch {torch.__version__}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if os.path.exists(file) else []
