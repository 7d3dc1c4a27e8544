"""RLVR on Megatron: the system around `lpreg`.

From Python: `load_config`, `train` and `push_to_hub` (docs/python.md). They are imported on first use, so that
`import megatron_rl` is quick and needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.api import RunResult, train
    from megatron_rl.config import Config, load_config
    from megatron_rl.errors import UserError
    from megatron_rl.run.model_card import push_to_hub

__version__ = "0.1.0"

_ON_FIRST_USE = {
    "Config": "megatron_rl.config",
    "RunResult": "megatron_rl.api",
    "UserError": "megatron_rl.errors",
    "load_config": "megatron_rl.config",
    "push_to_hub": "megatron_rl.run.model_card",
    "train": "megatron_rl.api",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'megatron_rl' has no attribute {name!r}")
    return getattr(importlib.import_module(_ON_FIRST_USE[name]), name)


__all__ = ["Config", "RunResult", "UserError", "load_config", "push_to_hub", "train"]
