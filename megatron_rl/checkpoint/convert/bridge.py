"""Model families beyond the table, through NVIDIA's megatron-bridge where it is installed.

It loads whole models, keeps no promise about memory, and checks its own work; nothing here verifies it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import SUPPORTED


def convert(source: Path, hf_folder: Path, partial: Path, *, to_hf: bool, family: str) -> None:
    """Raises UserError when the package is not there, or does not know the family."""
    bridge = _auto_bridge(family)
    try:
        if to_hf:
            bridge.from_hf_pretrained(str(hf_folder)).export_ckpt(str(source), str(partial))
        else:
            bridge.import_ckpt(str(source), str(partial))
    except ValueError as error:  # what it raises for a model it does not know
        raise UserError(f"megatron-bridge cannot convert {source} ({family}): {error}") from error


def _auto_bridge(family: str) -> Any:
    if importlib.util.find_spec("megatron.bridge") is None:
        raise UserError(
            f"{family} is not one of the families converted here ({', '.join(SUPPORTED.values())}). Others go through "
            "the package megatron-bridge, which is not installed: run `pip install megatron-bridge` where a GPU and "
            "Transformer Engine are, such as NVIDIA's NeMo container."
        )
    from megatron.bridge import AutoBridge

    return AutoBridge
