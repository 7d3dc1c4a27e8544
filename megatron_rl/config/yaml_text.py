"""Reading and writing YAML with the scalars of YAML 1.2: `no`, `off` and dates stay text, `1e-4` is a number."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_DIGITS = "0123456789"
_FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raises an error for two equal keys, of which PyYAML would take the last."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice in one mapping", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would not read back as text, so that every reader gets the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Puts text with rare line separators in double quotes, the only style that keeps them."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$"), list("-+" + _DIGITS))
for _cls in (_Loader, _Dumper):
    _cls.add_implicit_resolver(_FLOAT, _FLOAT_PATTERN, list("-+." + _DIGITS))


MOST_VALUES = 100_000
"""Most values of a YAML text, with those that aliases repeat."""
MOST_YAML = 2**22
"""Largest YAML file, in bytes."""


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text. Raises yaml.YAMLError, also for a text whose aliases multiply its values."""
    with _loaded(text) as (loader, root):
        return None if root is None else loader.construct_document(root)


@contextmanager
def _loaded(text: str) -> Iterator[tuple[_Loader, yaml.Node | None]]:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is not None:
                _count(root, {})
            yield loader, root
        finally:
            loader.dispose()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """Returns the number of values below a node, each as often as aliases repeat it. Raises yaml.YAMLError if there are
    more than MOST_VALUES, or if a value contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        counted[id(node)] = MOST_VALUES + 1  # while the node itself is being counted
        below = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counted[id(node)] = 1 + sum(_count(part, counted) for part in below)
    if counted[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES} values, counted with those that aliases repeat")
    return counted[id(node)]


def dump_yaml(tree: dict[str, Any]) -> str:
    """Returns YAML text with the keys in the given order and every plain value on one line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


@dataclass(frozen=True)
class Leaf:
    """A plain value, or an empty section or list, of a YAML text."""

    key: tuple[str, ...]
    """Path of names, and of indices in lists."""
    value: Any
    line: int
    """Line that the value ends in, from 0."""
    end: int
    """Column after the value."""


def leaves(text: str) -> list[Leaf]:
    """The values of a YAML text with their places, in order. Raises yaml.YAMLError."""
    with _loaded(text) as (loader, root):
        return [] if root is None else list(_leaves(root, (), loader))


def _leaves(node: yaml.Node, key: tuple[str, ...], loader: _Loader) -> Iterator[Leaf]:
    if isinstance(node, yaml.MappingNode) and node.value:
        for name, value in node.value:
            yield from _leaves(value, (*key, str(name.value)), loader)
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            yield from _leaves(value, (*key, str(index)), loader)
    else:
        yield Leaf(key, loader.construct_object(node, deep=True), node.end_mark.line, node.end_mark.column)


def yaml_problem(error: yaml.YAMLError) -> str:
    """Returns what is wrong with a YAML text, and where."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{where}{getattr(error, 'problem', None) or error}"


def show(value: Any) -> str:
    """Returns a value and its kind as YAML has them, for messages."""
    if value is None:
        return "null"
    kinds = {
        bool: "a switch",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a section",
    }
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({kinds.get(type(value), type(value).__name__)})"
