"""Checks that the processes, the precision and the tracker are what the launch asked for."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import joblib
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, LoggerType, parse_flag_from_env

from finetune.core.distributed import together
from finetune.core.errors import UserError, first_line
from finetune.core.groups import processes
from finetune.core.launcher import launch_error, launcher_was_given, set_by_launcher

_ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def check_processes() -> None:
    """Raise if processes that were asked for do not know of each other: each would train alone.

    Raises:
        UserError: on every such process, with its message on the first.
    """
    _refuse_sharded_launches()
    if processes().num_processes > 1:
        _pause_before_forks()
        return
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked > 1:
        problem = (
            f"launch: found 1 process where WORLD_SIZE in the environment is {asked}: without an accelerator, "
            "Accelerate needs ACCELERATE_USE_CPU=true in the environment to connect them"
        )
        raise launch_error(problem)
    if "WORLD_SIZE" not in os.environ and set_by_launcher("MASTER_ADDR"):  # it sets that for several processes alone
        raise UserError(
            "launch: accelerate launch was asked for several processes and started 1, as it does without several "
            "accelerators; start CPU processes with ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train.py ..., "
            "or ask for --num_processes 1"
        )


def _refuse_sharded_launches() -> None:
    """On CPUs Accelerate quietly ignores FSDP; elsewhere evaluation would wait forever and saving would fail."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            problem = (
                f"launch: found ACCELERATE_USE_{name}=true, from accelerate launch --use_{name.lower()} or its config "
                "file, which is not supported: remove it, and set training.shard=true in the run's config to shard the "
                "model"
            )
            raise launch_error(problem)


def _pause_before_forks() -> None:
    """Wait a moment before every fork, which starts data workers.

    Before Python 3.12 the child waits forever (python/cpython#112275) if another thread held the interpreter's list of
    threads when it was forked. gloo's threads do so for microseconds after a collective operation: of 3,000 forks, two
    children hung.
    """
    if sys.version_info < (3, 12):
        os.register_at_fork(before=partial(time.sleep, 0.05))


def accelerator_options() -> dict[str, Any]:
    """Arguments of the Accelerator that do not depend on the run."""
    return {
        "dataloader_config": DataLoaderConfiguration(non_blocking=True),
        # Gradients live in the buckets that are reduced: one copy of them less.
        "kwargs_handlers": [DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    }


@contextmanager
def launch_errors(tracker: str | None) -> Iterator[None]:
    """Turn what the Accelerator's constructor raises into one line: fp16 without a GPU, a tracker that it has not.

    Entered by all processes, which all raise UserError if it failed on any of them.
    """
    problem = None
    try:
        with warnings.catch_warnings():  # of a tracker that is not installed, which `check_launch` refuses
            warnings.filterwarnings("ignore", message="`log_with=", category=UserWarning)
            yield
    except (ValueError, ImportError, RuntimeError) as error:
        problem = UserError(f"launch: Accelerate cannot be set up as requested: {first_line(error)}")
        known = [kind.value for kind in LoggerType if kind != LoggerType.ALL]
        if tracker is not None and tracker not in known:
            problem = UserError(f"logging.tracker: found {tracker!r}; expected null or one of {', '.join(known)}")

    def tell() -> None:
        if problem is not None:
            raise problem

    together(tell)


def check_launch(accelerator: Accelerator, gradient_accumulation_steps: int, tracker: str | None) -> None:
    """Compare the Accelerator with what was asked for, where it overrides or ignores a wish without a word.

    Raises:
        UserError: accumulation steps overridden by the environment; a precision or a tracker that is not available.
    """
    if (found := accelerator.gradient_accumulation_steps) != gradient_accumulation_steps:
        raise UserError(
            f"{_ACCUMULATION_VARIABLE}: found {found} in the launch's environment, where the config gives "
            f"{gradient_accumulation_steps}, which it would silently override; unset it, or make them agree"
        )
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:  # Accelerate would train in float32
        found = f"found mixed precision {accelerator.mixed_precision} on {accelerator.device.type}"
        raise UserError(f"launch: {found}, which does not support it; expected no or bf16: --mixed_precision bf16")
    if tracker is not None and not accelerator.log_with:  # Accelerate would log nothing
        raise UserError(
            f"logging.tracker: {tracker} is not installed here; pip install {tracker}, or set tensorboard or null"
        )


def use_available_cores(accelerator: Accelerator) -> None:
    """Train with every core that this process may use, where one process trains on a CPU.

    `accelerate launch` sets OMP_NUM_THREADS=1 for every process if the user gives no number. A number from the user
    counts; for several processes the launch decides.
    """
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
        return
    variables = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    if launcher_was_given("--num_cpu_threads_per_process") or not all(map(set_by_launcher, variables)):
        return
    # joblib knows affinity and a container's quota. A second thread of a core adds nothing to multiplications.
    torch.set_num_threads(min(joblib.cpu_count(), psutil.cpu_count(logical=False) or joblib.cpu_count()))
