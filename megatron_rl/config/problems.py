"""What is wrong with a configuration tree, in words: where it was set, the key, what was given, what belongs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .keys import Key, expected, has_keys, is_known, nearest
from .overrides import Override

if TYPE_CHECKING:
    from .files import Layer


def unknown_in_path(key: Key) -> str | None:
    """What is unknown about an override's key, if anything."""
    for end in range(1, len(key) + 1):
        if not is_known(key[:end]):
            wanted = key if end == 1 else key[:end]
            return f"unknown key {'.'.join(key)}; {nearest(wanted)}"
    return None


def unknown_keys(tree: Any, key: Key) -> Iterator[str]:
    """Unknown keys of a tree whose root is at `key`."""
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from unknown_keys(value, (*key, str(index)))
    if not isinstance(tree, dict) or not has_keys(key):
        return  # a mapping where a plain value belongs is a wrong type, found later
    for name, value in tree.items():
        here = (*key, str(name))
        if not isinstance(name, str):
            yield f"{'.'.join(here)}: a name must be text; put it in quotes"
        elif not is_known(here):
            yield f"unknown key {'.'.join(here)}; {nearest(here)}"
        else:
            yield from unknown_keys(value, here)


def type_problems(error: ValidationError, tree: dict[Any, Any]) -> dict[Key, str]:
    """A line a key, in the order of the schema. A union reports once per member; here that is one problem."""
    lines: dict[Key, str] = {}
    for item in error.errors():
        key: list[str] = []
        value: Any = tree
        for part in item["loc"]:
            if isinstance(value, dict) and (part in value or item["type"] == "missing"):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int):
                value = value[part] if part < len(value) else None
            else:
                break  # the rest of `loc` names a member of a union
            key.append(str(part))
        dotted = ".".join(key)
        if item["type"] == "missing" and value is None:
            lines[tuple(key)] = f"{dotted} is missing; expected {expected(tuple(key))}"
        elif item["type"] == "string_pattern_mismatch":
            lines[tuple(key)] = f"{dotted}: only letters, digits, - and _ may be in this name"
        else:
            wanted = item["ctx"]["error"] if item["type"] == "value_error" else expected(tuple(key))
            lines[tuple(key)] = f"{dotted}: {show(value)} given; expected {wanted}"
    return lines


def source(key: Key, layers: Sequence[Layer], overrides: list[Override]) -> str:
    """Where the value came from: the last override at, above or below the key, else the last file that says it."""
    for override in reversed(overrides):
        shared = min(len(key), len(override.key))
        if override.key[:shared] == key[:shared]:
            return f"override {override.text}"
    return str(next((layer.path for layer in reversed(layers) if layer.sets(key)), layers[-1].path))


def show(value: Any) -> str:
    """A value and its kind, as YAML would have it."""
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
