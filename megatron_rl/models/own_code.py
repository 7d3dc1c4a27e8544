"""Model folders that bring code of their own. Such code is never run, and nobody is asked whether it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.utils.bounded import read_json

FILES = ("config.json", "tokenizer_config.json")


def refuse_own_code(folder: Path) -> None:
    """Raises UserError if a file of the folder names classes that only the folder's own code has (`auto_map`).

    transformers would otherwise ask on the terminal whether to run the code, or take a class of its own in its place.
    """
    for name in FILES:
        if classes := _auto_map(folder / name):
            raise UserError(
                f"{folder / name} wants to run code of its own ({classes}), which megatron-rl never does: use a model "
                "that transformers knows. If the model works without this code, remove the entry auto_map"
            )


def _auto_map(path: Path) -> str:
    """Returns the entries of a file's auto_map as text; empty if there are none, or the file cannot be read."""
    try:
        content: Any = read_json(path)
    except UserError:
        return ""  # whoever needs the file says what is wrong with it
    entries = content.get("auto_map") if isinstance(content, dict) else None
    if isinstance(entries, dict):
        return ", ".join(f"{key}: {value}" for key, value in entries.items())
    return str(entries) if entries else ""
