"""A checkpoint of a run seen as a model: its place, the model that was trained, and the files with the weights.

The weight files of a checkpoint are those of a Hugging Face folder under other names, so links make it one.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_rl.checkpoint.manifest import MANIFEST, checkpoints, read_manifest, verify
from megatron_rl.config.yaml_text import MOST_YAML, parse_yaml
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import INDEX, copy_all_but_weights
from megatron_rl.utils.bounded import read_text

WEIGHTS = "weights"


def find_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint at `path`, which is a checkpoint, a run's folder or a folder of checkpoints.

    For the latter two that is the newest checkpoint. Returns None if there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    return found[-1] if found else None


def trained_from(checkpoint: Path, option: str) -> Path:
    """Returns the Hugging Face folder of the trained model, as the run's config.yaml names it.

    Raises UserError if that folder is not found; the message asks the user for `option`.
    """
    config = checkpoint.resolve().parents[1] / "config.yaml"
    if not config.is_file():
        raise UserError(f"{checkpoint} is no longer in its run's folder. Name the run's model with {option} FOLDER.")
    try:
        folder = Path(parse_yaml(read_text(config, MOST_YAML))["model"]["path"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{config} does not say which model was trained ({error!r}). Name it with {option} FOLDER."
        ) from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{checkpoint} was trained from {folder}, which does not exist on this machine. Name the model with "
            f"{option} FOLDER."
        )
    return folder


def weight_files(checkpoint: Path) -> dict[str, str]:
    """Returns tensor name -> file name in the checkpoint. Raises UserError if a file is missing or damaged."""
    manifest = read_manifest(checkpoint)
    files = {name: entry for name, entry in manifest.files.items() if entry.kind == WEIGHTS}
    verify(checkpoint, replace(manifest, files=files))
    return {tensor: name for name, entry in files.items() for tensor in entry.tensors}


def link_as_model(checkpoint: Path, folder: Path, base: Path | None = None) -> None:
    """Makes `folder` a Hugging Face folder: links to the checkpoint's weights, copies of the base model's small files.

    base: the model that was trained; by default the one that the run's config.yaml names. Raises UserError if the base
    model is not found or a weight file is damaged.
    """
    weight_map = weight_files(checkpoint)
    copy_all_but_weights(base or trained_from(checkpoint, "--base"), folder)
    files = [checkpoint.resolve() / name for name in sorted(set(weight_map.values()))]
    for file in files:
        (folder / file.name).symlink_to(file)
    total = sum(file.stat().st_size for file in files)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
