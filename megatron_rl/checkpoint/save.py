"""Checkpoints as folders that exist whole or not at all.

Ranks write into `step_000050.partial`; the driver adds the manifest and renames.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class DriverState:
    """What the driver itself must remember."""

    step: int
    weight_version: int
    cursor: dict[str, Any]


def save_checkpoint(
    folder: Path, state: DriverState, save_ranks: Callable[[Path], dict[str, str]], bytes_needed: int
) -> Path:
    """Write `folder/step_NNNNNN`. On a full disk: nothing half-written, older checkpoints untouched, a UserError.

    Checkpoints of later steps belong to a course that a resume from an older one has left: they are removed.
    """
    target = folder / f"step_{state.step:06d}"
    partial = target.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < bytes_needed:
        raise UserError(_full_disk(target, f"{bytes_needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        hashes = save_ranks(partial)
        manifest = {"format": 1, "state": asdict(state), "sha256": hashes}
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)  # the same step again, after a resume from an older one
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(_full_disk(target, error.strerror or "no space left")) from error
        raise UserError(f"cannot write the checkpoint {target}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in checkpoints(folder):
        if _step(path) > state.step:
            shutil.rmtree(path)
    return target


def _full_disk(target: Path, what: str) -> str:
    return (
        f"no room for the checkpoint {target} ({what}). Nothing was half-written and earlier checkpoints are intact: "
        f"free some space, then go on with resume=auto"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    named = (path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdecimal())
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for path in checkpoints(folder)[:-count]:
        shutil.rmtree(path)


def read_checkpoint(folder: Path) -> DriverState:
    """The driver's state, after checking that every file is there and whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        state = DriverState(**manifest["state"])
        hashes = dict(manifest["sha256"])
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({error}): choose an older checkpoint with resume=PATH"
        ) from error
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"checkpoint file {path} is missing: choose an older checkpoint with resume=PATH")
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != expected:
            raise UserError(f"checkpoint file {path} is damaged (wrong SHA-256): choose an older one with resume=PATH")
    return state
