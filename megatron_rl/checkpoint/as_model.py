"""A checkpoint seen as a Hugging Face folder: its weight files are that already, under other names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_rl.checkpoint.hf_format import INDEX, copy_all_but_weights
from megatron_rl.checkpoint.manifest import MANIFEST, checkpoints, read_manifest, verify
from megatron_rl.errors import UserError

WEIGHTS = "weights"


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest one of the run that it is; None where it is neither."""
    if (path / MANIFEST).is_file():
        return path
    found = checkpoints(path / "checkpoints")
    return found[-1] if found else None


def link_as_model(checkpoint: Path, folder: Path, base: Path | None = None) -> None:
    """Make `folder` a model folder: links to the checkpoint's weights, copies of the base model's small files.

    base: the model that was trained; None: as the run's config.yaml says. Raises UserError where that is not there, or
    a weight file is damaged.
    """
    manifest = read_manifest(checkpoint)
    files = {name: entry for name, entry in manifest.files.items() if entry.kind == WEIGHTS}
    verify(checkpoint, replace(manifest, files=files))
    copy_all_but_weights(base or _base_model(checkpoint), folder)
    for name in files:
        (folder / name).symlink_to((checkpoint / name).resolve())
    weight_map = {tensor: name for name, entry in files.items() for tensor in entry.tensors}
    total = sum(entry.bytes for entry in files.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _base_model(checkpoint: Path) -> Path:
    config = checkpoint.resolve().parents[1] / "config.yaml"
    try:
        base = Path(yaml.safe_load(config.read_text())["model"]["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint}: {config} does not say which model was trained: give --base FOLDER") from error
    if not base.is_dir():
        raise UserError(f"{checkpoint} was trained from {base}, which is not there: give --base FOLDER")
    return base
