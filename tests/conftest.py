"""Tests leave nothing behind and reach nobody: caches lie in a folder of their own, and the hub is out of reach."""

import gc
import os
import shutil
import tempfile

import pytest

gc.disable()  # until all tests are imported: see `finetune.core.launcher.prepare_for_imports`
CACHE = tempfile.mkdtemp(prefix="finetune-tests-")
# Before any test module imports `datasets` or `huggingface_hub`, which read these once.
os.environ |= {"HF_HOME": CACHE, "HF_DATASETS_CACHE": os.path.join(CACHE, "datasets"), "HF_HUB_OFFLINE": "1"}
os.environ.pop("HF_HUB_CACHE", None)
os.environ["COUNTED_FLOPS"] = os.path.join(CACHE, "flops")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Files whose tests take longest come first, so that two workers end at about the same time."""
    first = ("test_benchmarks.py", "test_soundness.py")  # some minutes each
    items.sort(key=lambda item: (item.path.name not in first, len(item.path.parents)))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _empty_cache():
    yield
    shutil.rmtree(CACHE, ignore_errors=True)
