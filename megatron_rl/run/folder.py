"""A run's folder: which run it holds, and which checkpoint the run resumes from."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from megatron_rl.checkpoint.manifest import MANIFEST, PARTIAL, Manifest, checkpoints, read_checkpoint
from megatron_rl.config import Config, expand
from megatron_rl.config.effective import read_expanded
from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_text
from megatron_rl.utils.files import atomically

CONFIG = "config.yaml"
LOCK = ".lock"


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
    has_run = holds_run(folder)
    if folder.exists() and not has_run and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
        raise UserError(f"{folder} is not empty and holds no run: choose another with run.folder=FOLDER")
    if resume == "auto":
        return _newest(folder)
    if isinstance(resume, Path):
        if has_run and not resume.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} already holds another run than {resume}: choose another with run.name=NAME")
        if (resume / MANIFEST).is_file():
            return Resumption(resume, read_checkpoint(resume, _progress))
        found = _newest(resume)
        if found is None:
            raise UserError(f"resume: {resume} is neither a checkpoint nor the folder of a run that has one")
        return found
    if has_run:
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


def holds_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def check_still_free(folder: Path) -> None:
    """Raises UserError if a run has begun in the folder since it was found to hold none."""
    if holds_run(folder):
        raise UserError(f"{folder}: another run has begun in this folder meanwhile. Choose another run.name")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other runs out of the folder while the block runs. Raises UserError if another process is in it.

    The operating system lifts the lock when this process ends in whatever way. A file system without locks is no error.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _not_written(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another run is in this folder ({file.read(200).strip() or 'of an unknown process'}). Wait "
                "for its end or stop it; another run takes another run.name"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise _not_written(folder, error) from error
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except OSError as error:
            raise _not_written(folder, error) from error
        yield


def create(config: Config) -> list[str]:
    """Creates the folder and writes the resolved configuration into it. Returns the settings that a resume changes.

    A damaged configuration of the run is replaced: nothing depends on it. Raises UserError if the folder cannot be
    written.
    """
    folder = config.run.folder
    path = folder / CONFIG
    try:
        before = read_expanded(read_text(path)) if path.is_file() else None
    except (yaml.YAMLError, UserError) as error:
        before, changes = None, [f"{path} was damaged, and is written anew ({' '.join(str(error).split())[:200]})"]
    else:
        changes = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.rglob(f".*{PARTIAL}"):  # files that a killed run was writing
            if left.is_file():
                left.unlink()
    except OSError as error:
        raise _not_written(folder, error) from error
    with atomically(path) as partial:
        partial.write_text(expand(config), encoding="utf-8")
    return changes + (_changes(before, read_expanded(expand(config))) if isinstance(before, dict) else [])


def _foreign(path: Path) -> bool:
    """Whether a file or folder is none of those that a run leaves behind that was killed at its very beginning."""
    return path.name != LOCK and not (path.name.startswith(".") and path.name.endswith(PARTIAL))


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to the run folder {folder}: {error.strerror}")


def _changes(before: Any, after: Any, key: str = "") -> list[str]:
    """Returns `key: old -> new` for every value that differs, except for `resume` itself."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in {**before, **after} if f"{key}{name}" != "resume"]
        return [line for name in names for line in _changes(before.get(name), after.get(name), f"{key}{name}.")]
    return [] if before == after else [f"{key.rstrip('.')}: {before} -> {after}"]
