"""Errors the user can act on."""


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
    """The first line of a library's error message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
