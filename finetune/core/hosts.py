"""The hosts of a run: how many processes share one, and what may not differ between them.

Each has a command line, files and memory of its own.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from finetune.core.distributed import printed_once
from finetune.core.errors import UserError
from finetune.core.groups import gathered

T = TypeVar("T")


def processes_here() -> int:
    """How many of the run's processes this host has, which share its memory. Called by all processes.

    By the hosts' names: not every launcher tells a process how many there are beside it.
    """
    host = socket.gethostname()
    return gathered(host).count(host)


def check_same_command(config: str, **options: Any) -> None:
    """Raise if processes were started with different commands. Called by all of them.

    On several hosts each command is typed, or filled in, on its own; the main process reads the config for all,
    so a difference would be ignored.

    Args:
        config: its file, of which the name has to be the same, and not the folder.

    Raises:
        UserError: on all processes, with the first difference.
    """

    def problem(expected: dict[str, Any], found: dict[str, Any], there: str, here: str) -> str | None:
        name = next((name for name in expected if found[name] != expected[name]), None)
        return name and (
            f"launch: found {name} {found[name]} on {there}, and {expected[name]} on {here}; expected the same command "
            "for all processes"
        )

    require_same({"config": Path(config).name, **options}, problem)


def require_same(own: T, problem: Callable[[T, T, str, str], str | None]) -> None:
    """Raise if what may not differ between processes does: each host has its own files. Called by all processes.

    Args:
        own: what this process has; has to be picklable.
        problem: called as (what the main process has, what another one has, the other's name, the main one's name);
            returns an error text, or None if they are the same run.

    Raises:
        UserError: on all processes, with the first problem.
    """
    (expected, main_host), *others = gathered((own, socket.gethostname()))
    for number, (found, host) in enumerate(others, 1):
        if told := problem(expected, found, f"process {number} ({host})", f"process 0 ({main_host})"):
            raise printed_once(UserError(told))
