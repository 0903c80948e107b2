"""Types of the config's values. Each carries the text that its error message gives as expected."""

import math
import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Strict
from pydantic_core import PydanticCustomError

from finetune.core.errors import short


def _step_rules(text: str) -> str:
    """Check rules in diffusers' notation. diffusers sorts them by step, so it would misread any other order."""
    *rules, last = text.split(",")
    pairs = [rule.split(":") for rule in rules]
    factors, steps = [float(factor) for factor, _ in pairs] + [float(last)], [int(step) for _, step in pairs]
    if steps != sorted({step for step in steps if step > 0}) or not all(0 <= f < math.inf for f in factors):
        raise ValueError
    return text


def expanded(path: str) -> str:
    """A path with `~` and environment variables replaced; anything else as it is.

    Raises:
        PydanticCustomError: of the type `path`, for a variable or user that does not exist.
    """
    home = os.path.expanduser(path)
    names = [name.strip("{}") for name in re.findall(r"\$(\w+|\{[^}]*\})", home, re.ASCII)]
    # An empty variable counts as missing: it would make `$DATA/run` a folder at the root of the disk.
    missing = [name for name in names if not os.environ.get(name)]
    result = os.path.expandvars(home)
    if home == path and path.startswith("~"):
        expected = f"the name of a user after ~; write ./{path.split('/')[0]} for a file of that name"
    elif missing:
        expected = f"a path, but the environment variable {missing[0]} is not set"
    elif re.search(r"[\x00-\x1f\x7f-\x9f]", result):
        expected = f"a path, but it stands for {short(result)}" if result != path else "one without control characters"
    else:
        return result
    raise PydanticCustomError("path", "{problem}", {"problem": f"found {short(path)}; expected {expected}"})


Flag = Annotated[bool, Field(description="true or false")]
Count = Annotated[int, Field(gt=0, description="a whole number above 0")]
Natural = Annotated[int, Field(ge=0, description="a whole number, 0 or more")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
NonNegative = Annotated[float, Field(ge=0, description="a number, 0 or more")]
Decay = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
Betas = Annotated[
    tuple[Fraction, Fraction], Strict(False), Field(description="a list of two numbers from 0 to below 1")
]
Scales = Annotated[
    NonNegative | Annotated[tuple[NonNegative, ...], Strict(False), Field(min_length=1)],
    Field(description="a number, 0 or more, or a list of them"),
]
Shapes = Annotated[
    tuple[Annotated[tuple[Count, Count], Strict(False)], ...],
    Strict(False),
    Field(min_length=1, description="a list of [width, height]"),
]
Buckets = Annotated[Count | Shapes, Field(description="a number of shapes or a list of [width, height]")]
Labels = Annotated[tuple[int | str, ...], Strict(False), Field(min_length=1, description="a list of numbers or texts")]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*[^\s\p{Cc}]\P{Cc}*$", description="a line of text")]
Names = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1, description="a list of names")]
Prompts = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1, description="a list of texts")]
# Paths, or names that have neither `~` nor `$`: hub ids, `digits`, `auto`, `never`.
Path = Annotated[Text, AfterValidator(expanded), Field(description="a line of text")]
Resume = Annotated[Path, Field(description="auto, never or the folder of a checkpoint")]
RepoId = Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="a repository like user/name")]
StepRules = Annotated[
    str, AfterValidator(_step_rules), Field(description="factor:until_step,...,factor like 1:100,0.1:200,0.01")
]
Mapping = Annotated[dict[str, Any], Field(description="a mapping")]
