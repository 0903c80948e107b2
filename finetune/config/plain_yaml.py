"""YAML of plain values, read strictly; what is written reads back as it was.

Safe YAML without tags, every key once, with the numbers of YAML 1.2 (`1e-5` among them, which PyYAML takes for text).
Its own code, since ruamel.yaml, too, accepts dates, keys that are numbers, and values that contain themselves.
"""

import re
from typing import Any, ClassVar, NoReturn

import yaml

TAG = "tag:yaml.org,2002:"


def read(text: str) -> Any:
    """The values in a document.

    Raises:
        ValueError: one line with the place, what was found and what was expected.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        problem = f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"line {line}: found {chr(error.character)!r}; expected printable text"
    except (ValueError, OverflowError):  # the code of a surrogate, or beyond Unicode
        problem = "found an escape like \\ud800 that is not a character; expected a character"
    except RecursionError:
        problem = "found values nested too deeply; expected sections with values"
    raise ValueError(problem)


def write(values: Any) -> str:
    """A document that `read` turns back into the same values; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Reads the strict YAML described above.

    An alias may stand for any value that contains no alias, so no value can contain itself, or a billion others.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    anchors_open = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if alias and self.anchors_open:
            self.refuse("found an alias inside an aliased value; expected the value itself", event)
        if not alias and event.tag is not None:
            self.refuse("found a tag; expected a plain value", event)
        anchored = not alias and event.anchor is not None
        self.anchors_open += anchored
        node = super().compose_node(parent, index)
        self.anchors_open -= anchored
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()  # fails on half a surrogate pair, which could be neither printed nor written
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.tag != f"{TAG}str":
                self.refuse("found a key that is not text; expected text", key)
            if key.value in seen:
                self.refuse(f"found the key {repr(key.value)[:60]} twice; expected it once", key)
            seen.add(key.value)
        return node

    def refuse(self, problem: str, at: yaml.Node | yaml.Event) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, at.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or another YAML reader would read as something other than text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'  # in any other style U+0085 would read back as a line feed
        return self.represent_scalar(f"{TAG}str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9_]{0,18})", [*"-+0123456789"]),
    ("float", r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|\.(inf|nan))", [*"-+.0123456789"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{TAG}{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
