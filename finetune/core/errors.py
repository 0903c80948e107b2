"""Errors the user can act on, and how their messages quote things."""

from collections.abc import Iterable
from itertools import islice
from typing import Any


class UserError(Exception):
    """A mistake of the user's, or a failure of the machine's: printed as one line a problem, without a traceback."""

    def __init__(self, *problems: str, exit_code: int = 2):
        super().__init__(*problems)
        self.exit_code = exit_code

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.problems)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, cut to at most 200 characters."""
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return first if len(first) <= 200 else f"{first[:197]}..."


def short(value: Any) -> str:
    """A value as a message quotes it, at most 60 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def printable(name: str) -> str:
    """A name from a disk or a dataset on one line, without control characters."""
    return name if name.isprintable() else repr(name)


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, as a message lists them. Of an iterator no more are made than one beyond these."""
    first = [*islice(names, most + 1)]
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")
