"""The frozen reference model of the KL penalty. A resumed run must use the same weights as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.checkpoint.manifest import ModelFolder
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import weights_sha256


def find_reference(config: Config, recorded: ModelFolder | None, start: Callable[[], Path]) -> ModelFolder | None:
    """Returns the reference model's folder; None if the loss needs no reference model.

    Args:
        config: Configuration of the run.
        recorded: Reference model of the checkpoint that the run resumes from.
        start: Returns the folder of the policy that RL starts from. It is called only if the configuration names no
            folder and the recorded folder is missing.

    Raises:
        UserError: the weights are not the recorded ones.
    """
    settings = config.algorithm.reference_kl
    if not settings.coefficient:
        return None
    folder = settings.model
    if folder is None and recorded and Path(recorded.path).is_dir():
        folder = Path(recorded.path)
    folder = (folder or start()).resolve()
    found = ModelFolder(str(folder), weights_sha256(folder))
    if recorded and found.sha256 != recorded.sha256:
        raise UserError(
            f"the reference model in {folder} is not the one this run was started with ({recorded.path}): its weights "
            "have another SHA-256. Give a folder with the same files with algorithm.reference_kl.model=FOLDER, or "
            "start a new run"
        )
    return found
