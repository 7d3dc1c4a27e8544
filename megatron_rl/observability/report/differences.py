"""In what the configurations of several runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .run_data import RunData

IGNORED = ("run.name", "run.folder", "resume")
MISSING = "-"


def differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key.path, one value a run) for every setting that is not the same in all of them."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, MISSING) for settings in flat]) for key in keys if key not in IGNORED]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    """Lists are values: two that differ are shown whole."""
    if not isinstance(value, dict):
        return {key: str(value)}
    return {
        path: text
        for name, part in value.items()
        for path, text in _flatten(part, f"{key}.{name}" if key else str(name)).items()
    }
