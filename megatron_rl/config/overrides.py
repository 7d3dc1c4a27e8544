"""Overrides of a configuration from the command line: `key.path=value`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megatron_rl.errors import UserError

from .keys import Key
from .yaml_text import parse_yaml, yaml_problem

LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Override:
    """One override, with its value parsed as YAML."""

    text: str
    """The override as given, or its beginning if it is long, for messages."""
    key: Key
    value: Any


def parse_override(text: str) -> Override:
    """Returns the override that a text states. Raises UserError if the text is malformed."""
    dotted, equals, value = text.partition("=")
    text = text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise UserError(f"override {text}: expected key.path=value, such as train.steps=100")
    if not value.strip():
        raise UserError(f"override {text}: nothing after the =; write {dotted[:LONGEST_SHOWN]}=null to clear the key")
    try:
        return Override(text, key, parse_yaml(value))
    except yaml.YAMLError as error:
        raise UserError(f"override {text}: the value is not valid YAML: {yaml_problem(error)}") from error


def apply_override(tree: dict[Any, Any], override: Override) -> None:
    """Sets the override's value in the tree. Raises UserError for an index past the end of a list."""
    node: Any = tree
    for depth, part in enumerate(override.key):
        last = depth == len(override.key) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                name = ".".join(override.key[:depth])
                raise UserError(f"override {override.text}: {name} has entries 0 to {len(node) - 1}, not {part}")
            step: Any = int(part)
        else:
            step = part
        if last:
            node[step] = override.value
            return
        child = node[step] if isinstance(node, list) else node.get(step)
        if not isinstance(child, (dict, list)):
            child = {}  # a section that was unset, or that an override replaces key by key
            node[step] = child
        node = child
