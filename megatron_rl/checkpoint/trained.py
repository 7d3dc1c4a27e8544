"""A run's checkpoint as a model: which one it is, what was trained, which of its files hold the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from megatron_rl.checkpoint.manifest import MANIFEST, checkpoints, read_manifest, verify
from megatron_rl.errors import UserError

WEIGHTS = "weights"


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest one of the run, or of the folder of checkpoints, that it is; None
    where it is none of them."""
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    return found[-1] if found else None


def trained_from(checkpoint: Path, option: str) -> Path:
    """The Hugging Face folder that the run's config.yaml says was trained. Raises UserError, which asks for `option`,
    where that is not there."""
    config = checkpoint.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(f"{checkpoint} is no longer in its run's folder. Name the run's model with {option} FOLDER.")
    try:
        folder = Path(yaml.safe_load(config.read_text())["model"]["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{config} does not say which model was trained ({error!r}). Name it with {option} FOLDER."
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{checkpoint} was trained from {folder}, which is not there (seen from here). Name it with "
            f"{option} FOLDER."
        )
    return folder


def weight_files(checkpoint: Path) -> dict[str, str]:
    """Tensor -> name of the safetensors file that holds it. Raises UserError where one is missing or damaged."""
    manifest = read_manifest(checkpoint)
    files = {name: entry for name, entry in manifest.files.items() if entry.kind == WEIGHTS}
    verify(checkpoint, replace(manifest, files=files))
    return {tensor: name for name, entry in files.items() for tensor in entry.tensors}
