"""The processes of a run: the Accelerator they share, and how they stay of one mind."""

import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed import DistError
from tqdm import tqdm

from finetune.capacity import is_out_of_memory
from finetune.errors import UserError, first_line

Answer = TypeVar("Answer")
_SECRET = re.compile(r"hf_\w+|(?<=://)[^/@\s]+(?=@)")  # a token of the hub, or what stands before a host
_ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def processes() -> PartialState:
    """The processes of this launch, before there is an Accelerator. Of itself PartialState does not look whether the
    launch is for the CPU, and would then take each of several processes for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def make_accelerator(output_dir: str, tracker: str | None, gradient_accumulation_steps: int) -> Accelerator:
    """The Accelerator for what the launch asks for: devices, processes, precision, compile.

    Raises:
        UserError: if the launch's environment overrides the accumulation steps, or it cannot be had here.
    """
    asked = os.environ.get(_ACCUMULATION_VARIABLE)
    if asked is not None and asked != str(gradient_accumulation_steps):
        raise UserError(
            f"{_ACCUMULATION_VARIABLE}: found {asked} in the launch's environment, where the config comes to "
            f"{gradient_accumulation_steps}; it would override the config silently: unset it, or make them agree"
        )
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            # Gradients live in the buckets that are reduced: one copy of them less.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except (ValueError, ImportError, RuntimeError) as error:  # fp16 without a GPU, a tracker that is not installed
        raise UserError(f"launch: Accelerate cannot set up what was asked for: {first_line(error)}") from error
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:  # which would go on in float32
        found = f"found mixed precision {accelerator.mixed_precision} on {accelerator.device.type}"
        raise UserError(f"launch: {found}, which has none; expected no or bf16: --mixed_precision bf16")
    if tracker is not None and not accelerator.log_with:  # which Accelerate would pass over
        raise UserError(
            f"logging.tracker: {tracker} is not installed here; pip install {tracker}, or set tensorboard or null"
        )
    return accelerator


def said_once(error: UserError) -> UserError:
    """An error that all processes raise: the main one with its words, the others with none."""
    return error if processes().is_main_process else UserError(exit_code=error.exit_code)


def on_main_process(ask: Callable[[], Answer]) -> Answer | None:
    """Ask on the main process alone and tell every process the answer; a UserError is raised on all of them.

    An answer that cannot be sent (an open file, say) stays on the main process: have `ask` return None elsewhere.
    """
    outcome: list = [None, None]
    if processes().is_main_process:
        try:
            outcome[0] = ask()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise said_once(outcome[1])
    return outcome[0]


def together(make: Callable[[], Answer]) -> Answer:
    """What every process makes for itself; none goes on, or waits for another, after one of them could not.

    Raises:
        UserError: on all processes, after it was raised on any.
    """
    made = problem = None
    try:
        made = make()
    except UserError as error:
        problem = error
    if problems := [found for found in gather_object([problem]) if found is not None]:
        raise said_once(problems[0])
    return made


def main_process_first(make: Callable[[], Answer]) -> Answer:
    """What every process makes for itself, the main one first: the others find the caches that it filled.

    Raises:
        UserError: on all processes, after it was raised on any.
    """
    is_main = processes().is_main_process
    first = together(make if is_main else lambda: None)
    second = together(make if not is_main else lambda: None)
    return first if is_main else second


def exit_code(run: Callable[[], int]) -> int:
    """What a run ends with. Whatever its user can do something about is said in lines, without a traceback."""
    try:
        code = run()
    except KeyboardInterrupt:  # before there was anything to save
        code = 130
    except (UserError, RuntimeError, MemoryError) as error:
        problem = error if isinstance(error, UserError) else _lost_process(error) or _no_memory(error)
        if problem is None:
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # else it is drawn once more, below the lines that are to be the last
        for line in problem.problems:
            print(f"error: {_SECRET.sub('***', line)}", file=sys.stderr)
        code = problem.exit_code
        del problem  # with its traceback, which holds the run's objects
    finally:  # torch would wait five seconds for each: the queue that tells a worker to end goes before it
        for worker in multiprocessing.active_children():
            worker.terminate()
    _part()
    return code


def _part() -> None:
    """Part from the other processes, when the run's objects are gone.

    If DDP's reducer is the last that holds gloo's process group, its end waits for gloo's thread, while that may wait
    for the interpreter, which the reducer's end holds: processes that never exit, once in ten stops.
    """
    gc.collect()
    processes().destroy_process_group()


def _lost_process(error: RuntimeError | MemoryError) -> UserError | None:
    """What is said when another process is gone; None if the error is about something else."""
    if not isinstance(error, DistError) and "gloo" not in str(error):
        return None
    return UserError(
        "launch: another process of this run ended, and this one cannot go on without it; its own lines say why (none: "
        "it was killed, perhaps for want of memory). The same command goes on from the newest checkpoint",
        exit_code=1,
    )


def _no_memory(error: RuntimeError | MemoryError) -> UserError | None:
    """What is said where memory ran out and no smaller micro-batch could be tried; None if it did not."""
    if not is_out_of_memory(error):
        return None
    return UserError(
        f"memory: ran out outside of a micro-batch: {first_line(error)}; nothing that was saved is touched. Set "
        "a smaller training.micro_batch_size or samples.count, or free some, and the same command goes on from the "
        "newest checkpoint",
        exit_code=1,
    )
