"""What a Hugging Face `config.json` says about a model, read once into typed numbers. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.errors import UserError

SUPPORTED = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""`model_type` -> architecture."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A dense Qwen3 or Qwen2 decoder."""

    family: str
    """The architecture's name, one of `SUPPORTED`'s values."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    """True size, before any padding."""
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool
    """The output layer shares the embedding's weight."""

    @property
    def qk_norm(self) -> bool:
        return self.family == "Qwen3ForCausalLM"

    @property
    def qkv_bias(self) -> bool:
        return self.family == "Qwen2ForCausalLM"

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> Architecture:
        """Raises UserError for a model this project cannot build, or a key that is not there."""
        family = _family(hf_config)
        _refuse_variants(hf_config)
        try:
            heads = hf_config["num_attention_heads"]
            return cls(
                family=family,
                layers=hf_config["num_hidden_layers"],
                hidden=hf_config["hidden_size"],
                heads=heads,
                kv_heads=hf_config.get("num_key_value_heads") or heads,
                head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
                ffn=hf_config["intermediate_size"],
                vocabulary=hf_config["vocab_size"],
                max_positions=hf_config["max_position_embeddings"],
                norm_eps=hf_config["rms_norm_eps"],
                rope_theta=_rope_theta(hf_config),
                tied=hf_config.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise UserError(f"The model's config.json lacks {error.args[0]!r}, which a {family} needs.") from None


def _family(hf_config: Mapping[str, Any]) -> str:
    names = hf_config.get("architectures") or [SUPPORTED.get(hf_config.get("model_type", ""), "")]
    if names[0] in SUPPORTED.values():
        return str(names[0])
    found = names[0] or hf_config.get("model_type") or "none named"
    raise UserError(
        f"The model's architecture ({found}) is not supported. Supported: {', '.join(SUPPORTED.values())} (dense)."
    )


def _rope_theta(hf_config: Mapping[str, Any]) -> float:
    """`rope_parameters` is where transformers 5 keeps it, `rope_theta` where earlier releases did."""
    rope = hf_config.get("rope_parameters") or {}
    return float(rope["rope_theta"] if "rope_theta" in rope else hf_config["rope_theta"])


def _refuse_variants(hf_config: Mapping[str, Any]) -> None:
    """Settings that change the mathematics and that the Megatron model here would silently leave out."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    variants = {
        f"rope scaling {rope_type!r}": rope_type != "default",
        "sliding-window attention (use_sliding_window: true)": hf_config.get("use_sliding_window", False),
        "attention_bias: true": hf_config.get("attention_bias", False),
        f"hidden_act: {hf_config.get('hidden_act')}": hf_config.get("hidden_act", "silu") != "silu",
    }
    for what, present in variants.items():
        if present:
            raise UserError(f"The model's config.json asks for {what}, which is not supported. Use a model without it.")
