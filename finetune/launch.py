"""The processes of a run: the Accelerator they share, and how they stay of one mind."""

import os
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

from finetune.config import UserError

Answer = TypeVar("Answer")
_ACCUMULATION_VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def count_processes() -> int:
    """Processes of this launch, before there is an Accelerator. Of itself PartialState does not look whether the launch
    is for the CPU, and would then take each of several processes for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes


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
        raise UserError(f"launch: Accelerate cannot set up what was asked for: {str(error).splitlines()[0]}") from error
    if tracker is not None and not accelerator.log_with:  # which Accelerate would pass over
        raise UserError(
            f"logging.tracker: {tracker} is not installed here; pip install {tracker}, or set tensorboard or null"
        )
    return accelerator


def on_main_process(accelerator: Accelerator, ask: Callable[[], Answer]) -> Answer | None:
    """Ask on the main process alone and tell every process the answer; a UserError is raised on all of them.

    An answer that cannot be sent (an open file, say) stays on the main process: have `ask` return None elsewhere.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = ask()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def problems_anywhere(attempt: Callable[[], None]) -> list[str]:
    """Have every process attempt the same, and tell each of them what went wrong on any: none waits for another."""
    problem = None
    try:
        attempt()
    except (OSError, RuntimeError) as error:  # torch and safetensors wrap a full disk in errors of their own
        problem = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    return [found for found in gather_object([problem]) if found]
