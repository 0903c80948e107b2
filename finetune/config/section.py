"""A mapping of the config: known keys, strict types, and problems that name the key."""

from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A mapping with known keys and strict types, except that a whole number may stand for a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """Cross-field checks: yields (the key, or "" for the whole section; the problem)."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.disagreements()):
            raise ValueError(*found)
        return self
