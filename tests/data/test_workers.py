"""Data workers: the same batches, signals, and what their deaths mean to the user."""

import os
import signal
import subprocess
import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.batch import BatchLayout
from finetune.data import workers
from finetune.data.batches import Batches
from finetune.data.order import WindowSampler
from finetune.data.pixels import Images
from finetune.data.workers import loader_problem, make_loader
from harness.batches import SLOTS, batches, wide_images
from harness.compare import unequal
from harness.faults import signal_self


def test_what_is_large_travels_in_one_block_of_shared_memory():
    """A block for each tensor would cost the main process more than reading the images itself."""
    batch = batches(wide_images()).__getitems__(SLOTS)
    unpack, (packed, places, numbers) = workers._Parcel(batch).__reduce__()
    assert places.keys() == {"images", "noise"}
    assert batch.keys() - numbers.keys() == places.keys()
    arrived = unpack(packed, places, numbers)
    assert len({arrived[name].untyped_storage().data_ptr() for name in places}) == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bool, torch.float16, torch.int64, torch.float32, torch.float64]),
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
        ),
        max_size=5,
    )
)
def test_a_batch_arrives_as_it_was_sent(tensors):
    batch = {str(place): torch.rand(shape).mul(9).to(dtype) for place, (dtype, shape) in enumerate(tensors)}
    unpack, parts = workers._Parcel(batch).__reduce__()
    arrived = unpack(*parts)
    assert unequal(arrived, batch) == []


@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)])
def test_batches_from_workers_equal_those_of_the_main_process(context, num_workers, tmp_path):
    wide_images(12).table.save_to_disk(tmp_path)  # a spawned worker is handed paths and not pixels
    images = Images(datasets.load_from_disk(str(tmp_path)), np.arange(12), channels=3, resolution=8)
    sampler, read = WindowSampler(len(images), 0, BatchLayout(2, 2, 1)), batches(images, crop="random", flip=True)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        alone = list(make_loader(read, sampler, num_workers=0, pin_memory=False))
        loader = make_loader(read, sampler, num_workers, pin_memory=False)
        loader.multiprocessing_context = context
        for epoch in (0, 1, 0):  # the same workers: only the slots tell them the epoch
            sampler.seek(epoch, 0)
            shared = list(loader)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(shared) == len(alone) == 6
    for one, other in zip(alone, shared, strict=True):
        assert unequal(one, other) == []
    assert torch.equal(torch.get_rng_state(), before)


class ReportingBatches(Batches):
    """Reports on the worker that reads."""

    def __getitems__(self, slots):
        ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGUSR1)]
        report = {"threads": torch.get_num_threads(), "ignored": all(ignored), "pid": os.getpid()}
        return {name: torch.tensor([value]) for name, value in report.items()}


@pytest.mark.slow
def test_workers_ignore_signals_to_the_job_and_use_one_thread(monkeypatch):
    dataset = ReportingBatches(wide_images(), 0, 1000, "uniform", "center", False)
    loader = make_loader(dataset, WindowSampler(6, 0, BatchLayout(2, 1, 1)), num_workers=2, pin_memory=False)
    reports = list(loader)
    workers = {int(worker["pid"]) for worker in reports}
    assert len(workers - {os.getpid()}) == 2
    assert all(worker["threads"] == 1 and worker["ignored"] for worker in reports)
    for name in ("TERM", "INT", "USR1"):  # as a scheduler sends them, to every process
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    time.sleep(0.2)
    assert {int(worker["pid"]) for worker in loader} == workers
    for worker in loader._iterator._workers:  # as this process does when it exits
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    loader_asks_after = 0.1  # seconds, and not 5, without a batch
    monkeypatch.setattr(type(loader._iterator)._try_get_data, "__defaults__", (loader_asks_after,))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)


class DyingBatches(Batches):
    """Ends the worker that reads."""

    def __getitems__(self, slots):
        if os.environ["FINETUNE_TEST_END"] == "kill":
            signal_self(signal.SIGKILL)
        os._exit(3)


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_worker_that_dies_is_a_one_line_error(end, monkeypatch):
    monkeypatch.setenv("FINETUNE_TEST_END", end)
    dataset = DyingBatches(wide_images(), 0, 1000, "uniform", "center", False)
    loader = make_loader(dataset, WindowSampler(6, 0, BatchLayout(2, 1, 1)), num_workers=1, pin_memory=False)
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        next(iter(loader))
    assert time.monotonic() - started < 30
    problem = loader_problem(caught.value)
    assert problem.exit_code == 1
    (line,) = problem.problems
    assert line == (
        "data.num_workers: a data worker was killed, most likely because memory ran out; "
        "set data.num_workers=0 or free some memory, and run the same command again"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "/dev/shm",
        ),
        ("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_1_2_3>: "
         "No space left on device (28)", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "killed"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
        ("CUDA out of memory", None),
    ],
)  # fmt: skip
def test_which_errors_are_blamed_on_the_loader(text, words):
    problem = loader_problem(RuntimeError(text))
    assert problem is None if words is None else words in str(problem)
