"""What a user can do something about, said in lines."""


class UserError(Exception):
    """A mistake of the user's, or the world's: one clear line a problem, and never a traceback."""

    def __init__(self, *problems: str, exit_code: int = 2):
        super().__init__(*problems)
        self.exit_code = exit_code

    @property
    def problems(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.problems)


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough to stand in a line of ours."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
