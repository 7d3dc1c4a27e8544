"""Which checkpoints stay: the newest, and the best by an evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.checkpoint.manifest import PARTIAL, checkpoints, read_manifest
from megatron_rl.config.schema import KeepBestSettings
from megatron_rl.errors import UserError


@dataclass(frozen=True, slots=True)
class Retention:
    """What `train.keep_checkpoints` and `train.keep_best` say."""

    last: int
    """The newest so many; 0: all."""
    best: KeepBestSettings | None = None


def prune(folder: Path, keep: Retention) -> None:
    """Remove all but the newest `keep.last` checkpoints and the best ones."""
    if keep.last:
        stay = {*checkpoints(folder)[-keep.last :], *best(folder, keep.best)}
        for path in checkpoints(folder):
            if path not in stay:
                shutil.rmtree(path)


def best(folder: Path, settings: KeepBestSettings | None) -> list[Path]:
    """The checkpoints whose step had the best values of the metric, best first; of equal ones the earlier."""
    if settings is None:
        return []
    values = {path: value for path in checkpoints(folder) if (value := _metric(path, settings.metric)) is not None}
    sign = -1 if settings.mode == "max" else 1
    return sorted(values, key=lambda path: sign * values[path])[: settings.count]


def _metric(path: Path, name: str) -> float | None:
    try:
        return read_manifest(path).metrics.get(name)
    except UserError:  # a damaged one is not the best
        return None


def link(folder: Path, keep: Retention, announce: Callable[[str], None]) -> None:
    """Let `latest` and `best` in the folder lead to those checkpoints. They are for people: nothing here reads them."""
    for name, found in (("latest", checkpoints(folder)[-1:]), ("best", best(folder, keep.best)[:1])):
        if not found:
            (folder / name).unlink(missing_ok=True)
            continue
        fresh = folder / f".{name}{PARTIAL}"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(found[0].name)
            fresh.replace(folder / name)
        except OSError as error:
            announce(f"{folder / name} could not be made to lead to {found[0].name}: {error.strerror}")
