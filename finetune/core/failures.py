"""How a process ends: its exit code, and libraries' errors that mean something else turned into one line."""

import multiprocessing
import re
import sys
from collections.abc import Callable

from accelerate.utils.memory import should_reduce_batch_size
from torch.distributed import DistError
from tqdm import tqdm

from finetune.core import groups
from finetune.core.distributed import leave_processes
from finetune.core.errors import UserError, first_line
from finetune.core.launcher import imports_done

_SECRET = re.compile(r"hf_\w+|(?<=://)[^/@\s]+(?=@)")  # a hub token, or credentials before a host

_TIMEOUT = re.compile(r"[Tt]imed out waiting (\d+)ms|[Tt]imeout\(ms\)=(\d+)")  # gloo's, NCCL's
_SILENT = re.compile(r"(?:\[(\S+)\]:\d+: )?(?:Connection timed out|Operation timed out|No route to host|Host is down)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: what Accelerate recognises, and on a CPU also bad_alloc and oneDNN's error.

    oneDNN reports every set-up failure with one message; in a network that already ran, memory is the likely cause.
    """
    onednn = isinstance(error, RuntimeError) and "could not create a primitive" in str(error)
    return (
        isinstance(error, MemoryError) or onednn or (isinstance(error, Exception) and should_reduce_batch_size(error))
    )


def exit_code(run: Callable[[], int]) -> int:
    """Run, and return the exit code; what the user can act on is printed as lines, without a traceback."""
    try:
        imports_done()
        code = run()
    except KeyboardInterrupt:  # before there was anything to save
        code = 130
    except (UserError, RuntimeError, MemoryError) as error:
        problem = error if isinstance(error, UserError) else _lost_process(error) or _out_of_memory(error)
        if problem is None:
            raise
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or it is drawn once more, below the error
        for line in problem.problems:
            print(f"error: {_SECRET.sub('***', line)}", file=sys.stderr)
        code = problem.exit_code
        del problem  # its traceback holds the run's objects
    finally:  # torch would wait five seconds for each worker: the queue that tells it to end is collected before it
        for worker in multiprocessing.active_children():
            worker.terminate()
    leave_processes()
    return code


def _lost_process(error: RuntimeError | MemoryError) -> UserError | None:
    """The error for the user if another process is gone, or does not answer, else None."""
    if not isinstance(error, DistError) and "gloo" not in str(error):
        return None
    if waited := _TIMEOUT.search(str(error)):
        seconds = int(waited[1] or waited[2]) / 1000
        return UserError(
            f"launch: another process of this run has not answered for {seconds:,.0f} s, so this one cannot continue; "
            "see whether it runs, and whether the connection to its host is up. Run the same command again to resume "
            "from the newest checkpoint",
            exit_code=1,
        )
    if silent := _SILENT.search(str(error)):
        where = f"the host {silent[1]}" if silent[1] else "another host of this run"
        return UserError(
            f"launch: {where} has been silent for {groups.SILENCE.total_seconds():,.0f} s, so this process cannot "
            "continue; see whether it runs, and whether the connection to it is up. Run the same command again to "
            "resume from the newest checkpoint",
            exit_code=1,
        )
    return UserError(
        "launch: another process of this run ended, so this one cannot continue; see the lines that it printed (if "
        "there are none it was killed, perhaps out of memory). Run the same command again to resume from the newest "
        "checkpoint",
        exit_code=1,
    )


def _out_of_memory(error: RuntimeError | MemoryError) -> UserError | None:
    """The error for the user if memory ran out outside of a micro-batch, else None."""
    if not is_out_of_memory(error):
        return None
    return UserError(
        f"memory: ran out outside of a micro-batch: {first_line(error)}; saved checkpoints are untouched. Set a "
        "smaller training.micro_batch_size or free some memory, and run the same command again to resume from the "
        "newest checkpoint",
        exit_code=1,
    )
