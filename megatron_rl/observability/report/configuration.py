"""The configuration of a run: every setting with the source of its value, and the differences between runs.

A run writes the source of each value as a trailing comment into config.yaml, such as `rho: 0.01  # preset paper`. The
sources are `default`, `preset`, `file` and `override`. A config.yaml without such comments is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from .run_data import RunData

IGNORED = ("run.name", "run.folder", "resume")
"""Settings that differ between any two runs."""
MISSING = "-"
DEFAULT = "default"
KINDS = (DEFAULT, "preset", "file", "override")


@dataclass(frozen=True, slots=True)
class ConfigLine:
    """One line of config.yaml without its trailing comment."""

    text: str
    source: str
    """The trailing comment, which names the source of the value; empty if the line has none."""

    @property
    def kind(self) -> str:
        """First word of the source if it is one of `KINDS`, `other` for any other source."""
        return next((kind for kind in KINDS if self.source.startswith(kind)), "other" if self.source else "")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting whose value is not a default."""

    key: str
    """Path of the key, such as `algorithm.lp_reg.rho`."""
    value: str
    line: ConfigLine
    """Line that names the source of the value."""


def config_lines(text: str) -> list[ConfigLine]:
    """Splits each line of a YAML text from its trailing comment. Lines that are only a comment are kept as text."""
    lines = text.splitlines()
    scalars = _scalar_columns(text, len(lines))
    found = []
    for line, covered in zip(lines, scalars, strict=True):
        begin = next((i for i in _comment_marks(line) if not any(a <= i < b for a, b in covered)), None)
        if begin is None or not line[:begin].strip():
            found.append(ConfigLine(line, ""))
        else:
            found.append(ConfigLine(line[:begin].rstrip(), line[begin:].lstrip("# ").rstrip()))
    return found


def chosen_settings(text: str) -> list[Setting]:
    """Returns the settings whose source is stated and is not `default`, in the order of the file."""
    lines = config_lines(text)
    if not any(line.source for line in lines):
        return []
    return [
        Setting(key, value, line) for key, value, line in _settings(yaml.compose(text), lines) if line.kind != DEFAULT
    ]


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Returns each setting that is not the same in all runs, with one value per run."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, MISSING) for settings in flat]) for key in keys if key not in IGNORED]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _comment_marks(line: str) -> Iterator[int]:
    """Yields the positions at which YAML may start a comment."""
    return (i for i, character in enumerate(line) if character == "#" and (i == 0 or line[i - 1].isspace()))


def _scalar_columns(text: str, count: int) -> list[list[tuple[int, int]]]:
    """Returns the columns [begin, end) that scalars cover on each of the lines; a `#` in them starts no comment."""
    covered: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken):
            first, last = token.start_mark, token.end_mark
            for number in range(first.line, min(last.line, count - 1) + 1):
                begin = first.column if number == first.line else 0
                covered[number].append((begin, last.column if number == last.line else len(text)))
    return covered


def _settings(node: Any, lines: Sequence[ConfigLine], path: str = "") -> Iterator[tuple[str, str, ConfigLine]]:
    """Yields key path, value and line of each setting whose source is stated."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else str(key.value)
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _settings(value, lines, name)
            continue
        ends_on_its_line = isinstance(value, yaml.ScalarNode) and value.style not in ("|", ">")
        last = value.end_mark.line if ends_on_its_line else value.start_mark.line
        line = next((lines[number] for number in (key.start_mark.line, last) if lines[number].source), None)
        if line is not None:
            yield name, _value(value), line


def _value(node: Any) -> str:
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(map(_value, node.value))}]"
    if isinstance(node, yaml.MappingNode):
        return f"{{{', '.join(f'{_value(key)}: {_value(value)}' for key, value in node.value)}}}"
    return str(node.value)


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Returns the settings by key path. A list counts as one value, so that lists that differ are shown in full."""
    if not isinstance(value, dict):
        return {key: str(value)}
    return {
        path: text
        for name, part in value.items()
        for path, text in _flatten(part, f"{key}.{name}" if key else str(name)).items()
    }
