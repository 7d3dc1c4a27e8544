"""A run's folder: which run it holds, and which checkpoint the run resumes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from megatron_rl.checkpoint.manifest import MANIFEST, Manifest, checkpoints, read_checkpoint
from megatron_rl.config import Config, expand
from megatron_rl.config.effective import read_expanded
from megatron_rl.errors import UserError

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True)
class Resumption:
    """The checkpoint that a run resumes from."""

    checkpoint: Path
    manifest: Manifest
    damaged: tuple[str, ...] = ()
    """Problems of newer checkpoints, which were skipped."""


def checkpoint_to_resume(config: Config) -> Resumption | None:
    """Returns the intact checkpoint that `resume` names; None if the run starts from step 0.

    Raises:
        UserError: the folder belongs to something else, `resume` names no checkpoint, or no checkpoint is intact.
    """
    folder, resume = config.run.folder, config.resume
    holds_run = (folder / CONFIG).is_file()
    if folder.exists() and not holds_run and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run: choose another with run.folder=FOLDER")
    if resume == "auto":
        return _newest(folder)
    if isinstance(resume, Path):
        if holds_run and not resume.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} already holds another run than {resume}: choose another with run.name=NAME")
        if (resume / MANIFEST).is_file():
            return Resumption(resume, read_checkpoint(resume, _progress))
        found = _newest(resume)
        if found is None:
            raise UserError(f"resume: {resume} is neither a checkpoint nor the folder of a run that has one")
        return found
    if holds_run:
        raise UserError(f"{folder} already holds a run. Resume it with resume=auto, or start another: run.name=NAME")
    return None


def _newest(run_folder: Path) -> Resumption | None:
    """Returns the newest intact checkpoint, None if there are no checkpoints. Raises UserError if all are damaged."""
    damaged: list[str] = []
    for path in reversed(checkpoints(run_folder / "checkpoints")):
        try:
            return Resumption(path, read_checkpoint(path, _progress), tuple(damaged))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError("\n".join(["none of the run's checkpoints can be used:", *damaged]))
    return None


def _progress(files: Sequence[str]) -> Iterable[str]:
    console = Console()
    return track(files, "checking checksums", console=console, transient=True, disable=not console.is_terminal)


def create(config: Config) -> list[str]:
    """Creates the folder and writes the resolved configuration into it. Returns the settings that a resume changes.

    Raises UserError if the folder cannot be written or its configuration is damaged.
    """
    folder = config.run.folder
    path = folder / CONFIG
    try:
        before = read_expanded(path.read_text()) if path.is_file() else None
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(expand(config))
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged ({error}): a run cannot be resumed in this folder") from error
    return _changes(before, read_expanded(expand(config))) if isinstance(before, dict) else []


def _changes(before: Any, after: Any, key: str = "") -> list[str]:
    """Returns `key: old -> new` for every value that differs, except for `resume` itself."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in {**before, **after} if f"{key}{name}" != "resume"]
        return [line for name in names for line in _changes(before.get(name), after.get(name), f"{key}{name}.")]
    return [] if before == after else [f"{key.rstrip('.')}: {before} -> {after}"]
