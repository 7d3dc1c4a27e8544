"""A checkpoint seen as a Hugging Face folder: its weight files are that already, under other names."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rl.checkpoint.trained import trained_from, weight_files
from megatron_rl.models.hf_format import INDEX, copy_all_but_weights


def link_as_model(checkpoint: Path, folder: Path, base: Path | None = None) -> None:
    """Make `folder` a model folder: links to the checkpoint's weights, copies of the base model's small files.

    base: the model that was trained; None: as the run's config.yaml says. Raises UserError where that is not there, or
    a weight file is damaged.
    """
    weight_map = weight_files(checkpoint)
    copy_all_but_weights(base or trained_from(checkpoint, "--base"), folder)
    files = [checkpoint.resolve() / name for name in sorted(set(weight_map.values()))]
    for file in files:
        (folder / file.name).symlink_to(file)
    total = sum(file.stat().st_size for file in files)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
