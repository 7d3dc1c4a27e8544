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
    if isinstance(resume, Path):
        if (resume / MANIFEST).is_file():
            return resume
        found = checkpoints(resume / "checkpoints")
        if not found:
            raise UserError(f"resume: {resume} is neither a checkpoint nor the folder of a run that has one")
        return found[-1]
    if resume == "auto":
        found = checkpoints(folder / "checkpoints")
        return found[-1] if found else None
    if (folder / CONFIG).exists():
        raise UserError(f"{folder} already holds a run. Go on with it: resume=auto; or start another: run.name=NAME")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another with run.folder=FOLDER")
    return None


def create(config: Config) -> None:
    """Make the folder and write the resolved configuration into it."""
    folder = config.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(expand(config))
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from error
