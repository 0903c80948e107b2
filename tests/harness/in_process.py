"""train.py's `main` in this process, for benchmarks that measure it from inside."""

import io
from contextlib import redirect_stderr, redirect_stdout

import train
from finetune.config.schema import Config
from harness.processes import forget_processes


class _Terminal(io.StringIO):
    """A stream that the progress bar takes for a terminal, so that it is drawn as often as a user would see it."""

    def isatty(self) -> bool:
        return True


def train_here(config: Config) -> None:
    """`train.main`, whose output nobody sees. Accelerate's state is new before it and after it."""
    forget_processes()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(_Terminal()):
            train.main(config)
    finally:
        forget_processes()
