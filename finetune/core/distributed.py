"""The processes of a run, and how they agree."""

import gc
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from finetune.core.errors import UserError
from finetune.core.groups import from_main_process, gathered, leave_groups, processes

T = TypeVar("T")


def say(text: str) -> None:
    """Print on the main process alone. `Accelerator.print` does so once a host."""
    if processes().is_main_process:
        print(text)


def printed_once(error: UserError) -> UserError:
    """An error that all processes raise: with its message on the main process, without one on the others."""
    return error if processes().is_main_process else UserError(exit_code=error.exit_code)


def on_main_process(ask: Callable[[], T]) -> T:
    """Call `ask` on the main process alone and give every process its answer, which has to be picklable.

    Raises:
        UserError: on all processes, if `ask` raised it.
    """
    answer: Any = None
    problem = None
    if processes().is_main_process:
        try:
            answer = ask()
        except UserError as error:
            problem = error
    answer, problem = from_main_process((answer, problem))
    if problem is not None:
        raise printed_once(problem)
    return answer


def together(make: Callable[[], T]) -> T:
    """Call `make` on every process; if one of them fails, none continues or waits for another.

    Raises:
        UserError: on all processes, if any of them raised it.
    """
    made: Any = None
    problem = None
    try:
        made = make()
    except UserError as error:
        problem = error
    if problems := [found for found in gathered(problem) if found is not None]:
        raise printed_once(problems[0])
    return made


def main_process_first(make: Callable[[], T]) -> T:
    """Call `make` on every process, on the main one first: the others find the caches that it filled.

    Raises:
        UserError: on all processes, if any of them raised it.
    """
    is_main = processes().is_main_process
    first = together(make if is_main else lambda: None)
    second = together(make if not is_main else lambda: None)
    made: Any = first if is_main else second
    return made


def made_once(make: Callable[[], T]) -> T:
    """Call `make` on the main process alone and give every process what it made, which has to be picklable.

    It may refer to files. Where they are missing, as on another host with a cache of its own, it is made there again.

    Raises:
        UserError: on all processes, if any of them raised it.
    """
    made: list[T] = []

    def pack() -> bytes:
        made.append(make())
        return pickle.dumps(made[0]) if processes().num_processes > 1 else b""

    packed = on_main_process(pack)

    def unpack() -> T:
        if made:
            return made[0]
        try:
            unpacked: T = pickle.loads(packed)  # of this launch's main process, through the control group
            return unpacked
        except FileNotFoundError:
            return make()

    return together(unpack)


def all_agree(answer: bool) -> bool:
    """Whether the answer is yes on every process."""
    return all(gathered(answer))


def leave_processes() -> None:
    """Destroy the process group, after the run's objects are gone.

    If DDP's reducer is the last to hold gloo's process group, its destructor waits for gloo's thread, which may wait
    for the interpreter lock, which the destructor holds: about one process in ten would never exit.
    """
    gc.collect()
    leave_groups()
