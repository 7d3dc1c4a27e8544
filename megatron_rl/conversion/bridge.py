"""Conversion of other model families through NVIDIA's megatron-bridge, if that package is installed.

megatron-bridge loads complete models, so memory use is not bounded, and its result is not verified here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import SUPPORTED


def convert(source: Path, hf_folder: Path, partial: Path, *, to_hf: bool, family: str) -> None:
    """Converts with megatron-bridge. Raises UserError if the package is not installed or does not know the family."""
    bridge = _auto_bridge(family)
    try:
        if to_hf:
            bridge.from_hf_pretrained(str(hf_folder)).export_ckpt(str(source), str(partial))
        else:
            bridge.import_ckpt(str(source), str(partial))
    except ValueError as error:  # raised by megatron-bridge for a model that it does not know
        raise UserError(f"megatron-bridge cannot convert {source} ({family}): {error}") from error


def _auto_bridge(family: str) -> Any:
    if importlib.util.find_spec("megatron.bridge") is None:
        raise UserError(
            f"{family} is not one of the families converted here ({', '.join(SUPPORTED.values())}). Others need the "
            "package megatron-bridge, which is not installed: run `pip install megatron-bridge` on a machine with a "
            "GPU and Transformer Engine, for example in NVIDIA's NeMo container."
        )
    from megatron.bridge import AutoBridge

    return AutoBridge
