"""Tokens that a configuration names, found in the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def single_token(tokenizer: Any, text: str, key: str) -> int:
    """The one token that `text` is; UserError where it is none or many."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # tokenizers raises nothing narrower where a word is not in its vocabulary
        raise UserError(f"{key}: {text!r} is not in the model's vocabulary: {error}") from error
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        what = f"{len(ids)} tokens: {ids}" if len(ids) != 1 else "unknown to it"
        raise UserError(f"{key}: {text!r} must be one token of the model's vocabulary; it is {what}")
    return int(ids[0])


def stop_token_ids(tokenizer: Any, model_folder: Path, chosen: list[int] | None) -> tuple[int, ...]:
    """What ends a response: as chosen, else the end tokens of generation_config.json, else the tokenizer's."""
    if chosen is not None:
        return tuple(chosen)
    generation = model_folder / "generation_config.json"
    try:
        ends = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{generation} is not a JSON object: {error}") from error
    if ends is None or ends == []:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise UserError(
            f"nothing ends a response: neither {generation} nor the tokenizer names an end token; "
            f"set rollout.stop_token_ids"
        )
    return tuple(ends) if isinstance(ends, list) else (int(ends),)
