"""The known keys of a configuration, the nearest one to an unknown key, and what each key expects."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from .fields import NameOrPath, Section
from .schema import Config

Key = tuple[str, ...]
ANY = "*"
"""Stands for a freely chosen name or the index of a list."""
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    Any: "any value",
}


@dataclass(frozen=True)
class _Node:
    """A key: its type, its bounds, and the keys below it."""

    kind: Any
    metadata: tuple[Any, ...]
    below: dict[str, _Node]


def _strip(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the type without Annotated, and without None if it is a union with one other member; and the metadata."""
    if get_origin(annotation) is Annotated:
        kind, *metadata = get_args(annotation)
        inner, inner_metadata = _strip(kind)
        return inner, (*inner_metadata, *metadata)
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _strip(members[0])
        return Union[tuple(members)], ()  # noqa: UP007 - built at run time
    return annotation, ()


def _build(annotation: Any, metadata: tuple[Any, ...] = ()) -> _Node:
    kind, inner = _strip(annotation)
    below: dict[str, _Node] = {}
    if isinstance(kind, type) and issubclass(kind, Section):
        below = {name: _build(field.annotation, tuple(field.metadata)) for name, field in kind.model_fields.items()}
    elif get_origin(kind) in (dict, list, tuple):
        below = {ANY: _build(get_args(kind)[-1])}
    return _Node(kind, (*inner, *metadata), below)


@cache
def _root() -> _Node:
    return _build(Config)


def _find(key: Key) -> _Node | None:
    node: _Node | None = _root()
    for part in key:
        if node is None:
            return None
        node = node.below.get(part) or node.below.get(ANY)
    return node


def is_known(key: Key) -> bool:
    """Whether there is such a key."""
    return _find(key) is not None


def has_keys(key: Key) -> bool:
    """Whether there may be keys below this one."""
    node = _find(key)
    return node is not None and bool(node.below)


@cache
def known_keys() -> tuple[Key, ...]:
    """Returns every key, sections included; `*` stands for a freely chosen name."""

    def walk(node: _Node, key: Key) -> Iterator[Key]:
        for name, child in node.below.items():
            yield (*key, name)
            yield from walk(child, (*key, name))

    return tuple(walk(_root(), ()))


def nearest(key: Key) -> str:
    """Returns a hint on what an unknown key may have meant: a key of its own section first, then any other."""
    section = key[:-1]
    parent = _find(section)
    if parent and (match := get_close_matches(key[-1], [n for n in parent.below if n != ANY], n=1)):
        return f"did you mean {'.'.join((*section, match[0]))}?"
    if parent and not parent.below:
        return f"{'.'.join(section)} takes {expected(section)}"
    dotted = {".".join(known): known for known in known_keys() if ANY not in known}
    same_name = [name for name, known in dotted.items() if known[-1] == key[-1]]
    if match := get_close_matches(".".join(key), same_name, n=1, cutoff=0.0):
        return f"did you mean {match[0]}?"
    if match := get_close_matches(".".join(key), dotted, n=1):
        return f"did you mean {match[0]}?"
    known_here = (parent or _root()).below
    return f"known here: {', '.join(known_here)}"


def expected(key: Key) -> str:
    """Returns in words what a key takes: "a whole number >= 1"."""
    node = _find(key)
    return _describe(node.kind, node.metadata) if node else "a known key"


def required(key: Key) -> str:
    """Returns in words what must be given for a missing key: what a plain key takes, or the required keys of a section,
    such as "train.steps (a whole number >= 1)"."""
    node = _find(key)
    if node is None or not (isinstance(node.kind, type) and issubclass(node.kind, Section)):
        return expected(key)
    names = [name for name, field in node.kind.model_fields.items() if field.is_required()]
    return ", ".join(f"{'.'.join((*key, name))} ({expected((*key, name))})" for name in names) or expected(key)


def _describe(kind: Any, metadata: tuple[Any, ...]) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        words = [str(value) for value in get_args(kind)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin is Union:
        return " or ".join(_describe(*_strip(member)) for member in get_args(kind))
    if origin is tuple:
        return f"a list of {len(get_args(kind))} entries, each {_describe(*_strip(get_args(kind)[0]))}"
    if origin is list:
        return f"a list of at least one entry, each {_describe(*_strip(get_args(kind)[0]))}"
    if origin is dict:
        return f"a section of names, each with {_describe(*_strip(get_args(kind)[1]))}"
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"a section with the keys {', '.join(kind.model_fields)}"
    for item in metadata:
        if isinstance(item, NameOrPath):
            return item.words
    return " ".join([_WORDS[kind], " and ".join(_bounds(metadata))]).rstrip()


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for item in metadata:
        for entry in getattr(item, "metadata", [item]):  # a Field holds its bounds in a list of its own
            for name, words in _BOUNDS.items():
                if (bound := getattr(entry, name, None)) is not None:
                    yield words.format(bound)
