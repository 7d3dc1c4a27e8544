"""The `config.json` of published models, so that a run can be planned and its layout checked before the model is there.

`configs/` has one file per model, with the keys that this package reads. A test compares the numbers of parameters with
the published ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import read_config

PUBLISHER = "Qwen"
"""The owner of all these models on the Hugging Face Hub."""
CONFIGS = Path(__file__).with_name("configs")


def published_models() -> list[str]:
    """Returns the names of the models whose config is in this package, such as `Qwen3-14B-Base`."""
    return sorted(path.name.removesuffix(".json") for path in CONFIGS.glob("*.json"))


def published_config(model: Path) -> dict[str, Any] | None:
    """Returns the config of the published model that a path or an id of the Hub is named after, or None."""
    name = published_name(model)
    if name not in published_models():
        return None
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def published_name(model: Path) -> str:
    """Returns the name of a model without its owner or folder, and without a revision: `owner/name@revision`."""
    return model.name.partition("@")[0]


def known_config(model: Path) -> dict[str, Any]:
    """Returns the config of a model folder, or of the published model that `model` is named after.

    `model` may be a path where the model is going to be, or an id of the Hugging Face Hub. Raises UserError if the
    model is neither there nor known.
    """
    if model.is_dir():
        return read_config(model)
    if (config := published_config(model)) is not None:
        return config
    raise UserError(
        f"model.path: {model} is no folder here, and no model whose sizes are known. Give a Hugging Face folder with "
        f"config.json, or one of {', '.join(published_models())}"
    )
