"""The frozen model of the KL penalty: where its weights come from, and that a resumed run has the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rl.checkpoint.manifest import ModelFolder
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import weights_sha256


def find_reference(config: Config, recorded: ModelFolder | None, start: Callable[[], Path]) -> ModelFolder | None:
    """The reference model's folder; None where the loss has no use for one.

    recorded: that of the run that is resumed. start: the folder of the policy as RL started from it; called only where
    no folder is named and the recorded one is gone. Raises UserError where the weights are not the recorded ones.
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
            "have another SHA-256. Name a folder with the same files by algorithm.reference_kl.model=FOLDER, or start "
            "a new run"
        )
    return found
