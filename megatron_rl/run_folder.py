"""A run's folder: whose it is, and which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.checkpoint.save import MANIFEST, checkpoints
from megatron_rl.config import Config, expand
from megatron_rl.errors import UserError

CONFIG = "config.yaml"


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that `resume` names; None for a start from step 0. Raises UserError where runs would mix."""
    folder, resume = config.run.folder, config.resume
    holds_run = (folder / CONFIG).is_file()
    if folder.exists() and not holds_run and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no run: choose another with run.folder=FOLDER")
    if resume == "auto":
        return _newest(folder)
    if isinstance(resume, Path):
        checkpoint = resume if (resume / MANIFEST).is_file() else _newest(resume)
        if checkpoint is None:
            raise UserError(f"resume: {resume} is neither a checkpoint nor the folder of a run that has one")
        if holds_run and not checkpoint.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} already holds another run than {resume}: choose another with run.name=NAME")
        return checkpoint
    if holds_run:
        raise UserError(f"{folder} already holds a run. Go on with it: resume=auto; or start another: run.name=NAME")
    return None


def _newest(run_folder: Path) -> Path | None:
    found = checkpoints(run_folder / "checkpoints")
    return found[-1] if found else None


def create(config: Config) -> None:
    """Make the folder and write the resolved configuration into it."""
    folder = config.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(expand(config))
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
