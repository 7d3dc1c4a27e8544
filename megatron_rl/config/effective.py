"""The effective values of a configuration, each with its source: the default, a preset, a file, or an override.

In the config.yaml of a run a source is a comment behind the value; a value without a comment is a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from lpreg.losses.registry import METHODS
from megatron_rl.errors import UserError

from .algorithm import AlgorithmSettings
from .method_sections import effective_values
from .methods import given_settings, method_class, section_key
from .schema import Config
from .yaml_text import dump_yaml, leaves, parse_yaml

DEFAULT = "default"
_HEADER = "# Every key of the run. A comment names the source of a value; values without a comment are defaults.\n"


@dataclass(frozen=True)
class EffectiveValue:
    """One key of a configuration."""

    key: str
    """Dotted path, with indices for lists."""
    value: Any
    source: str
    """default, preset NAME, file PATH, or override."""


def effective(config: Config) -> list[EffectiveValue]:
    """Returns every plain value of the configuration with its source, in the order of the keys."""
    return read_effective(expand(config))


def expand(config: Config) -> str:
    """Returns YAML text with every key, defaults included, and the source of each value that is not a default.

    `load_config` reads it back to an equal Config.
    """
    text = dump_yaml(_tree(config))
    lines = text.splitlines()
    for leaf in leaves(text):
        source = _source(config, leaf.key)
        if source != DEFAULT and leaf.value is not None:
            lines[leaf.line] += f"  # {' '.join(source.split())}"
    return _HEADER + "\n".join(lines) + "\n"


def read_effective(text: str) -> list[EffectiveValue]:
    """Returns what `expand` wrote: the values of a run's config.yaml with their sources. Raises yaml.YAMLError."""
    lines = text.splitlines()
    values = []
    for leaf in leaves(text):
        comment = lines[leaf.line][leaf.end :].strip()
        source = comment[1:].strip() if comment.startswith("#") else ""
        values.append(EffectiveValue(".".join(leaf.key), leaf.value, source or DEFAULT))
    return values


def read_expanded(text: str) -> Any:
    """Returns the tree of a run's config.yaml. The settings of the method are completed, as today's files have them, if
    the run is from a version that wrote null for a setting with the value of its preset. Raises yaml.YAMLError."""
    tree = parse_yaml(text)
    if not isinstance(tree, dict) or not isinstance(given := tree.get("algorithm"), dict):
        return tree
    try:
        algorithm = AlgorithmSettings.model_validate(without_nulls(given))
    except ValidationError:
        return tree
    return {**tree, "algorithm": algorithm.model_dump(mode="json")}


def without_nulls(tree: Any) -> Any:
    """Returns the tree without keys whose value is null, which clears a key."""
    if isinstance(tree, dict):
        return {name: without_nulls(value) for name, value in tree.items() if value is not None}
    if isinstance(tree, list):
        return [without_nulls(value) for value in tree]
    return tree


def _tree(config: Config) -> dict[str, Any]:
    """Every key; with the settings of a user's own method completed if it can be imported here."""
    tree = config.model_dump(mode="json")
    algorithm = config.algorithm
    if algorithm.name not in METHODS:
        try:
            method = method_class(algorithm.name)
        except UserError:  # reported where the method is made; a login node may lack torch
            return tree
        tree["algorithm"]["settings"] = effective_values(method, algorithm.preset, given_settings(algorithm))
    return tree


def _source(config: Config, key: tuple[str, ...]) -> str:
    if source := config.sources.get(".".join(key)):
        return source
    algorithm = config.algorithm
    if algorithm.preset is not None and key[:2] == ("algorithm", section_key(algorithm)):
        try:
            presets = method_class(algorithm.name).presets
        except UserError:
            return DEFAULT
        if key[-1] in presets.get(algorithm.preset, {}):
            return f"preset {algorithm.preset}"
    return DEFAULT
