"""Tests leave nothing behind and reach nobody: caches lie in a folder of their own, and the hub is out of reach."""

import gc
import os
import shutil
import tempfile

gc.disable()  # until all tests are imported: see `finetune.core.launcher.prepare_for_imports`
CACHE = tempfile.mkdtemp(prefix="finetune-tests-")
# Before any test module imports `datasets` or `huggingface_hub`, which read these once.
os.environ |= {"HF_HOME": CACHE, "HF_DATASETS_CACHE": os.path.join(CACHE, "datasets"), "HF_HUB_OFFLINE": "1"}
os.environ.pop("HF_HUB_CACHE", None)
os.environ.setdefault("COUNTED_FLOPS", os.path.join(CACHE, "flops"))  # workers share that of the process they belong to
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Files whose tests take longest come first, so that two workers end at about the same time."""
    first = ("test_benchmarks.py", "test_soundness.py")  # some minutes each
    items.sort(key=lambda item: (item.path.name not in first, len(item.path.parents)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)
