"""Where a value of a configuration was set: a file, an override, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .files import Layer
from .keys import Key
from .overrides import Override

OVERRIDE = "override"
"""The source of a value that an override set."""


def place_of(key: Key, layers: Sequence[Layer], overrides: Sequence[Override]) -> str:
    """Returns where the user would look for the key's value: the last override at, above or below the key, otherwise
    the last file that sets it."""
    for override in reversed(overrides):
        shared = min(len(key), len(override.key))
        if override.key[:shared] == key[:shared]:
            return f"override {override.text}"
    return str(next((layer.path for layer in reversed(layers) if layer.sets(key)), layers[-1].path))


def source_of(key: Key, layers: Sequence[Layer], overrides: Sequence[Override]) -> str | None:
    """Returns "override" or "file PATH" if the value of a plain key was set there; None if it was set nowhere, or
    cleared by a null."""
    for override in reversed(overrides):
        if override.key == key[: len(override.key)]:
            return OVERRIDE if _is_set(override.value, key[len(override.key) :]) else None
    for layer in reversed(layers):
        found = _is_set(layer.tree, key)
        if found is not None:
            return f"file {layer.path}" if found else None
    return None


def _is_set(node: Any, key: Key) -> bool | None:
    """Whether a tree sets a key to a value, clears it by a null (False), or says nothing about it (None)."""
    for part in key:
        if isinstance(node, list) and part.isdigit():
            if int(part) >= len(node):
                return None
            node = node[int(part)]
        elif isinstance(node, dict):
            if part not in node:
                return None
            node = node[part]
        else:
            break  # a null above the key, or a value that stands for a whole section
    return node is not None
