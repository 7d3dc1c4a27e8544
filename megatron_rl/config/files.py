"""Configuration files: a mapping in YAML, and the file it builds on, named by `base`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.errors import UserError

from .keys import Key
from .yaml_text import parse_yaml, show, yaml_problem

BASE = "base"


@dataclass(frozen=True)
class Layer:
    """One file of a configuration, without its `base`."""

    path: Path
    tree: dict[Any, Any]

    def sets(self, key: Key) -> bool:
        """Whether the file sets the key or a key below it."""
        node: Any = self.tree
        for part in key:
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                return False
        return True


def read_layers(path: Path) -> list[Layer]:
    """Returns the file's bases, the deepest first, then the file. The path of a base is relative to the file that names
    it.

    Raises UserError if a file is missing, is no mapping, or is its own base.
    """
    layers: list[Layer] = []
    seen: list[Path] = []
    named_by = ""
    while True:
        if path.resolve() in seen:
            raise UserError(f"{path}: base: {' -> '.join(str(p) for p in [*seen, path.resolve()])} goes in a circle")
        seen.append(path.resolve())
        tree = _read(path, named_by)
        base = tree.pop(BASE, None)
        layers.insert(0, Layer(path, tree))
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise UserError(f"{path}: base: {show(base)} given; expected the path of another configuration file")
        named_by = f" (the base of {path})"
        path = path.parent / Path(base).expanduser()


def merge(layers: list[Layer]) -> dict[Any, Any]:
    """Returns the merged tree: sections are merged key by key, anything else (lists too) replaces the base's value.

    A null clears the base's value, and so does an empty mapping: `suites: {}` leaves none of the base's suites.
    """
    merged: dict[Any, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer.tree)
    return merged


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict) and above):
        return above
    return {**below, **{name: _merged(below.get(name), value) for name, value in above.items()}}


def _read(path: Path, named_by: str) -> dict[Any, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file{named_by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {yaml_problem(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: sections such as `model:` and `train:` are expected, not {show(tree)}")
    return tree
