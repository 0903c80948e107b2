"""Reading, overriding and validating a config. Each problem is one line: location, value found, value expected."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from finetune.config import plain_yaml
from finetune.config.fields import expanded
from finetune.config.schema import Config
from finetune.config.section import Section
from finetune.core.errors import UserError, short

COMMAND_LINE = "command line"


class ConfigError(UserError):
    """Invalid config."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `key.path=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: with every problem, one line each.
    """
    path = _file(path)
    values, overridden = _read(path), list[tuple[str, ...]]()
    problems: list[str] = []
    for override in overrides:
        try:
            overridden.append(_override(values, override))
        except ConfigError as error:
            problems += error.problems
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for keys, problem in dict.fromkeys(line for detail in error.errors() for line in _explain(detail, values)):
            problems.append(f"{_source(keys, path, overridden)}: {_name(*keys)}: {problem}")
    if problems:
        raise ConfigError(*problems)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config, in the schema's order; loading it gives an equal one."""
    return plain_yaml.write(config.model_dump())


def _file(path: str | Path) -> str:
    try:
        return expanded(str(path))
    except PydanticCustomError as error:
        raise ConfigError(f"--config: {error.message()}") from None


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = _parse(Path(path).read_bytes().decode(), _name(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_name(path)}: found invalid UTF-8 at byte {error.start}; expected UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{_name(path)}: cannot be read ({reason}); expected a YAML file") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else short(values)
        raise ConfigError(f"{_name(path)}: found {found}; expected a mapping with {', '.join(Config.model_fields)}")
    return values


def _override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set the value that `key.path=value` names, creating the mappings above it, and return the path."""
    key, equals, text = override.partition("=")
    *above, last = keys = tuple(key.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"{COMMAND_LINE}: found {short(override)}; expected key.path=value")
    value = _parse(text, f"{COMMAND_LINE}: {_name(*keys)}")
    for depth, name in enumerate(above, start=1):
        inner = {} if values.get(name) is None else values[name]
        if not isinstance(inner, dict):
            found = f"{_name(*keys[:depth])}={short(inner)}"
            raise ConfigError(f"{COMMAND_LINE}: {_name(*keys)}: found {found}; expected a mapping there")
        values[name] = dict(inner)  # a copy, since an alias may have put the same mapping elsewhere too
        values = values[name]
    values[last] = value
    return keys


def _source(keys: tuple[str, ...], path: str | Path, overridden: list[tuple[str, ...]]) -> str:
    """Where the value at a key path comes from: the file, the command line, or both."""
    if any(keys[: len(given)] == given for given in overridden):
        return COMMAND_LINE
    partly = any(given[: len(keys)] == keys for given in overridden)
    return f"{_name(path)} and {COMMAND_LINE}" if partly else _name(path)


def _parse(text: str, source: str) -> Any:
    try:
        return plain_yaml.read(text)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _explain(error: Any, values: Any) -> list[tuple[tuple[str, ...], str]]:
    """(key path, problem) for an error of pydantic's, at the nearest key that the schema declares."""
    keys: tuple[str, ...] = ()
    section: type[Section] | None = Config
    takes = ""
    for name in error["loc"]:
        if section is None:
            break
        keys = (*keys, name)
        if (field := section.model_fields.get(name)) is None:
            return [(keys, f"unknown key; {_nearest(keys, section)}")]
        if name not in values:
            return [(keys, f"missing; expected {expected(field)}")]
        takes = expected(field)
        values, section = values[name], section_of(field.annotation)
    if section is not None and error["type"] == "value_error":
        return [((*keys, *key.split(".")) if key else keys, problem) for key, problem in error["ctx"]["error"].args]
    problem = error["msg"] if error["type"] == "path" else f"found {short(values)}; expected {takes}"
    return [(keys, problem)]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, or may hold, if any."""
    parts = get_args(annotation) or (annotation,)
    return next((part for part in parts if isinstance(part, type(Section))), None)


def expected(field: FieldInfo) -> str:
    """What a key takes, in the words of its error message."""

    def alternatives(annotation: Any) -> Iterator[str]:
        if annotation is type(None):
            yield "null"
        elif isinstance(annotation, type(Section)):
            yield f"a mapping with {', '.join(annotation.model_fields)}"
        elif get_origin(annotation) is Annotated:
            yield annotation.__metadata__[-1].description
        else:  # a union or a literal
            for part in get_args(annotation):
                yield from [part] if isinstance(part, str) else alternatives(part)

    return field.description or " or ".join(alternatives(field.annotation))


def _nearest(keys: tuple[str, ...], section: type[Section]) -> str:
    *above, key = keys
    if near := difflib.get_close_matches(key.lower(), section.model_fields, n=1):
        return f"did you mean {_name(*above, *near)}?"
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    elsewhere = [f"{name}.{key}" for name, other in sections.items() if key in getattr(other, "model_fields", ())]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"expected one of {', '.join(section.model_fields)}"


def _name(*parts: str | Path) -> str:
    """A key path or a file name, on one line whatever characters it contains."""
    return ".".join(part if part and part.isprintable() else repr(part) for part in map(str, parts))
