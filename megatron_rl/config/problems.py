"""Problems of a configuration tree in words: the key, what was given, what is expected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from .keys import Key, expected, has_keys, is_known, known_keys, nearest, required
from .peers import translations
from .yaml_text import show


def unknown_in_path(key: Key) -> str | None:
    """Returns a message if an override's key is unknown, otherwise None."""
    for end in range(1, len(key) + 1):
        if not is_known(key[:end]):
            wanted = key if end == 1 else key[:end]
            return f"unknown key {'.'.join(key)}; {_hint(wanted, key)}"
    return None


def unknown_keys(tree: Any, key: Key) -> Iterator[str]:
    """Yields a message for each unknown key of a tree whose root is at `key`."""
    if isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from unknown_keys(value, (*key, str(index)))
    if not isinstance(tree, dict) or not has_keys(key):
        return  # a mapping in place of a plain value is a wrong type, which the schema finds
    for name, value in tree.items():
        here = (*key, str(name))
        if not isinstance(name, str):
            yield f"{'.'.join(here)}: a name must be text; put it in quotes"
        elif not is_known(here):
            yield f"unknown key {'.'.join(here)}; {_hint(here, here, value)}"
        else:
            yield from unknown_keys(value, here)


def _hint(unknown: Key, key: Key, value: Any = None) -> str:
    """Returns what a key may have meant, whose part `unknown` is not known: our keys for those of other trainers in it,
    or the nearest key."""
    ours = list(translations(value, key))
    if not ours:
        return nearest(unknown)
    same_name = any(known[-1] == key[-1] for known in known_keys())
    return "; ".join([nearest(unknown), *ours] if same_name else ours)


def type_problems(error: ValidationError, tree: dict[Any, Any]) -> dict[Key, str]:
    """Returns one line per key, in the order of the schema. pydantic reports a union once per member; here that is one
    problem."""
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
            lines[tuple(key)] = f"{dotted} is missing; it needs {required(tuple(key))}"
        elif item["type"] == "string_pattern_mismatch":
            lines[tuple(key)] = f"{dotted}: only letters, digits, - and _ may be in this name"
        else:
            wanted = item["ctx"]["error"] if item["type"] == "value_error" else expected(tuple(key))
            lines[tuple(key)] = f"{dotted}: {show(value)} given; expected {wanted}"
    return lines
