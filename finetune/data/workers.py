"""The data loader and its worker processes: how batches travel, how workers end, what their errors mean."""

import os
import signal
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from finetune.core.errors import UserError
from finetune.data.batches import Batches
from finetune.data.order import WindowSampler


def make_loader(
    dataset: Batches, sampler: WindowSampler, num_workers: int, pin_memory: bool
) -> DataLoader[dict[str, torch.Tensor]]:
    """A loader of the sampler's batches, in its order. A worker that dies raises RuntimeError: see `loader_problem`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_hand_over,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, torch.get_default_dtype()),
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # else each epoch draws from the global one
    )


def _hand_over(batch: Any) -> "dict[str, torch.Tensor] | _Parcel":
    return batch if torch.utils.data.get_worker_info() is None else _Parcel(batch)


class _Parcel:
    """A batch on its way out of a worker, a dict again when it arrives.

    A block of shared memory costs half a millisecond to pass on, so that all tensors travel in one; one number a slot
    goes faster through the pipe. Pickled here: the queue's feeder thread would drop a batch that does not fit in shared
    memory, and the loader would hang.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.numbers = {name: tensor.numpy() for name, tensor in batch.items() if tensor.dim() == 1}
        shared = {name: tensor for name, tensor in batch.items() if name not in self.numbers}
        self.places: _Places = {}
        size = 0
        for name, tensor in shared.items():
            self.places[name] = size, tensor.dtype, tensor.shape
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        block = torch.empty(size, dtype=torch.uint8)
        for name, tensor in _views(block, self.places).items():
            tensor.copy_(shared[name])
        self.packed = bytes(ForkingPickler.dumps(block))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.packed, self.places, self.numbers)


_ALIGNED = 64  # bytes: tensors in a block start where any type and vector instruction may
_Places = dict[str, tuple[int, torch.dtype, torch.Size]]  # of each tensor in a block: first byte, type, shape


def _views(block: torch.Tensor, places: _Places) -> dict[str, torch.Tensor]:
    return {
        name: block[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
        for name, (start, dtype, shape) in places.items()
    }


def _unpack(packed: bytes, places: _Places, numbers: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    try:
        block = ForkingPickler.loads(packed)
    except (OSError, EOFError) as error:  # the worker that holds the memory is gone
        time.sleep(1)  # let the SIGCHLD handler raise here, not later
        raise RuntimeError("DataLoader worker exited unexpectedly") from error
    return _views(block, places) | {name: torch.from_numpy(values) for name, values in numbers.items()}


def _start_worker(dtype: torch.dtype, worker: int) -> None:
    """Ignore the signals that reach every process of a job: the main process decides what to finish."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_main_process, daemon=True).start()
    torch.set_default_dtype(dtype)  # a spawned worker starts with float32


def _obey_the_main_process() -> None:
    """Exit on SIGTERM from the parent only, which waits for its workers when it exits; ignore the scheduler's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def loader_problem(error: RuntimeError | OSError | MemoryError) -> UserError | None:
    """The error for the user if a data worker is the cause, or None."""
    text = str(error)
    if "Bus error" in text or "shared memory" in text or "No space left on device" in text:
        cause = "shared memory (/dev/shm) has no room for its batches"
    elif "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        cause = "a data worker was killed, most likely because memory ran out"
    else:
        return None
    advice = "set data.num_workers=0 or free some memory, and run the same command again"
    return UserError(f"data.num_workers: {cause}; {advice}", exit_code=1)
