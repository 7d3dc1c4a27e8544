"""Checks of the values in a Hugging Face `config.json`: a damaged or hostile file must not cost memory or time by its
numbers, nor raise errors that do not name the key. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.errors import UserError

Check = Callable[[Any], bool]


def _whole(least: int, most: int) -> tuple[str, Check]:
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def _number(most: float) -> tuple[str, Check]:
    return f"a number above 0, up to {most:g}", lambda value: type(value) in (int, float) and 0 < value <= most


def _list_of(kind: type) -> Check:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_SWITCH: tuple[str, Check] = ("true or false", lambda value: isinstance(value, bool))
_SECTION: tuple[str, Check] = ("an object", lambda value: isinstance(value, Mapping))
_TEXT: tuple[str, Check] = ("text", lambda value: isinstance(value, str))
_WIDTH, _COUNT = _whole(1, 2**22), _whole(1, 2**14)

_EXPECTED: dict[str, tuple[str, Check]] = {
    "architectures": ("a list of names", _list_of(str)),
    "model_type": _TEXT,
    "num_hidden_layers": _whole(1, 2**12),
    "hidden_size": _WIDTH,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _COUNT,
    "intermediate_size": _WIDTH,
    "vocab_size": _whole(1, 2**26),
    "max_position_embeddings": _whole(1, 2**31),
    "num_experts": _whole(0, 2**14),
    "num_local_experts": _whole(0, 2**14),
    "num_experts_per_tok": _COUNT,
    "moe_intermediate_size": _WIDTH,
    "decoder_sparse_step": _whole(1, 2**12),
    "mlp_only_layers": ("a list of layers", _list_of(int)),
    "layer_types": ("a list of names", _list_of(str)),
    "rms_norm_eps": _number(1),
    "rope_theta": _number(1e15),
    "rope_scaling": _SECTION,
    "rope_parameters": _SECTION,
    "hidden_act": _TEXT,
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_sliding_window"), _SWITCH
    ),
}
_EXPECTED_OF_ROPE = {
    "rope_theta": _number(1e15),
    "factor": _number(2**20),
    "original_max_position_embeddings": _whole(1, 2**31),
    "partial_rotary_factor": _number(1),
}


def check_config(hf_config: Mapping[str, Any]) -> None:
    """Raises UserError with every key whose value is of another kind or size than that of any model. The bounds are
    well above those of all models. A null stands for a key that is left out."""
    problems = _problems(hf_config, _EXPECTED, "")
    for section in ("rope_scaling", "rope_parameters"):
        if isinstance(hf_config.get(section), Mapping):
            problems += _problems(hf_config[section], _EXPECTED_OF_ROPE, f"{section}.")
    if problems:
        raise UserError("\n  ".join(["The model's config.json has values that no model has:", *problems]))


def _problems(values: Mapping[str, Any], expected: dict[str, tuple[str, Check]], prefix: str) -> list[str]:
    return [
        f"{prefix}{key}: {_shown(values[key])}; expected {what}"
        for key, (what, holds) in expected.items()
        if values.get(key) is not None and not holds(values[key])
    ]


def _shown(value: object) -> str:
    text = "an enormous number" if type(value) is int and abs(value) >= 10**40 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
