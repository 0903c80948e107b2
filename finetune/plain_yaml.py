"""YAML of plain values, read strictly and written so that it comes back.

Safe YAML without tags, every key once, with the numbers of YAML 1.2 (`1e-5` among them, which PyYAML takes for text).
"""

import re
from typing import Any, ClassVar, NoReturn

import yaml

TAG = "tag:yaml.org,2002:"


def read(text: str) -> Any:
    """The values of a document.

    Raises:
        ValueError: one line: where, what was found, what was expected.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark, what = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        problem = f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"line {line}: found {chr(error.character)!r}; expected printable text"
    except (ValueError, OverflowError):  # from a surrogate's or an impossible code
        problem = "found an escape like \\ud800 that is no character; expected the character"
    except RecursionError:
        problem = "found values nested too deeply; expected sections and their values"
    raise ValueError(problem)


def write(values: Any) -> str:
    """A document that `read` gives back as it was; keys keep their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain values without tags, every key once, with the numbers of YAML 1.2, `1e-5` among them.

    An alias may stand for any value that has no alias in it, so that nothing contains itself, or a billion others.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}
    anchors_open = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if alias and self.anchors_open:
            self.refuse("found an alias in what is aliased itself; expected the value", event)
        if not alias and event.tag is not None:
            self.refuse("found a tag; expected a plain value", event)
        anchored = not alias and event.anchor is not None
        self.anchors_open += anchored
        node = super().compose_node(parent, index)
        self.anchors_open -= anchored
        if isinstance(node, yaml.ScalarNode):
            node.value.encode()  # half a surrogate pair could be neither printed nor written
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.tag != f"{TAG}str":
                self.refuse("found a key that is no name; expected names", key)
            if key.value in seen:
                self.refuse(f"found the key {repr(key.value)[:60]} again; expected it once", key)
            seen.add(key.value)
        return node

    def refuse(self, problem: str, at: yaml.Node | yaml.Event) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, problem, at.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader`, or another reader of YAML, would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'  # in any other, U+0085 would come back as a line feed
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
