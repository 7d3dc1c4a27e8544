"""Which checkpoints are kept: the newest ones, and the best ones by a metric."""

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
    """The settings `train.keep_checkpoints` and `train.keep_best`."""

    last: int
    """Number of newest checkpoints to keep. 0 keeps all."""
    best: KeepBestSettings | None = None


def prune(folder: Path, retention: Retention) -> None:
    """Removes all checkpoints except the newest `retention.last` and the best ones."""
    if retention.last:
        kept = {*checkpoints(folder)[-retention.last :], *best(folder, retention.best)}
        for path in checkpoints(folder):
            if path not in kept and not path.is_symlink():  # what a user's link leads to is not this run's
                shutil.rmtree(path)


def best(folder: Path, settings: KeepBestSettings | None) -> list[Path]:
    """Returns the checkpoints with the best values of the metric, best first and, for equal values, earlier first."""
    if settings is None:
        return []
    values = {path: value for path in checkpoints(folder) if (value := _metric(path, settings.metric)) is not None}
    sign = -1 if settings.mode == "max" else 1
    return sorted(values, key=lambda path: sign * values[path])[: settings.count]


def _metric(path: Path, name: str) -> float | None:
    try:
        return read_manifest(path).metrics.get(name)
    except UserError:  # a damaged checkpoint never counts as the best
        return None


def link(folder: Path, retention: Retention, announce: Callable[[str], None]) -> None:
    """Points the links `latest` and `best` in the folder to those checkpoints.

    The links are for users; no code reads them. A file system without links is announced and is no error.
    """
    for name, found in (("latest", checkpoints(folder)[-1:]), ("best", best(folder, retention.best)[:1])):
        if not found:
            (folder / name).unlink(missing_ok=True)
            continue
        fresh = folder / f".{name}{PARTIAL}"
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(found[0].name)
            fresh.replace(folder / name)
        except OSError as error:
            announce(f"cannot link {folder / name} to {found[0].name}: {error.strerror}")
