"""A model's architecture, read from its Hugging Face `config.json` into typed fields. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.models.config_check import check_config

SUPPORTED = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""Maps `model_type` to the architecture's name."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "Qwen3MoeForCausalLM": {"num_key_value_heads": 4, "max_position_embeddings": 32768},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
}
"""Values of keys that config.json may leave out: those of transformers' configuration class of the family. A family
without a `head_dim` here has hidden_size / num_attention_heads."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Supported types of rope scaling: those whose frequencies do not depend on the sequence length."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in the sparse layers."""

    count: int
    per_token: int
    ffn: int
    normalised: bool
    """Whether the router weights of each token's experts are normalised to sum to one."""
    layers: tuple[bool, ...]
    """For each layer of the model, whether the layer is sparse."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of one of the supported families."""

    family: str
    """Name of the architecture, one of the values of `SUPPORTED`."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Feed-forward size of the dense layers."""
    vocabulary: int
    """Size of the vocabulary without padding; see `parallel.layout.padded_vocabulary`."""
    max_positions: int
    """Number of positions that the model is made for, rope scaling included."""
    norm_eps: float
    rope_theta: float
    tied: bool
    """Whether the LM head shares the embedding's weight."""
    rope_type: str = "default"
    """One of `ROPE_TYPES`."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the attention's output projection has a bias."""
    experts: Experts | None = None
    """None if every layer is dense."""

    @property
    def qk_norm(self) -> bool:
        return self.family in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")

    @property
    def even_length(self) -> float:
        """Sequence length at which causal attention costs as much as all matrix products of the layers.

        Per token and layer, attention over the tokens before it takes 2 * length * heads * head_dim FLOPs, and the
        matrix products take 2 FLOPs for each weight that they use.
        """
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        widths = [
            self.experts.per_token * self.experts.ffn if self.experts and self.is_sparse(layer) else self.ffn
            for layer in range(self.layers)
        ]
        weights = attention + 3 * self.hidden * sum(widths) / self.layers
        return weights / (self.heads * self.head_dim)

    def is_sparse(self, layer: int) -> bool:
        """Returns whether this layer of the model, counted from 0, has experts."""
        return self.experts is not None and self.experts.layers[layer]

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> Architecture:
        """Reads a `config.json`. Raises UserError if the model is not supported or a key is missing."""
        check_config(hf_config)
        family = _family(hf_config)
        hf_config = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, **DEFAULTS[family], **hf_config}
        try:
            _refuse_variants(hf_config)
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
                max_positions=max_positions_of(hf_config),
                norm_eps=hf_config["rms_norm_eps"],
                rope_theta=_rope_theta(hf_config),
                tied=hf_config.get("tie_word_embeddings", False),
                rope_type=_rope_type(hf_config),
                qkv_bias=family == "Qwen2ForCausalLM" or hf_config.get("attention_bias", False),
                output_bias=family != "Qwen2ForCausalLM" and hf_config.get("attention_bias", False),
                experts=_experts(hf_config) if family == "Qwen3MoeForCausalLM" else None,
            )
        except KeyError as error:
            raise UserError(f"The model's config.json lacks {error.args[0]!r}, which a {family} needs.") from None
        except TypeError as error:  # a null for a value that the family needs
            raise UserError(f"The model's config.json has a null that no {family} has: {error}") from None


def _family(hf_config: Mapping[str, Any]) -> str:
    names = hf_config.get("architectures") or [SUPPORTED.get(hf_config.get("model_type", ""), "")]
    if names[0] in SUPPORTED.values():
        return str(names[0])
    found = names[0] or hf_config.get("model_type") or "none named"
    raise UserError(f"The model's architecture ({found}) is not supported. Supported: {', '.join(SUPPORTED.values())}.")


def _experts(hf_config: Mapping[str, Any]) -> Experts | None:
    """Published folders call the count `num_experts`; files that transformers 5 wrote call it `num_local_experts`."""
    count = hf_config["num_experts"] if "num_experts" in hf_config else hf_config["num_local_experts"]
    every, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or ()
    sparse = tuple(
        count > 0 and (layer + 1) % every == 0 and layer not in dense for layer in range(hf_config["num_hidden_layers"])
    )
    if not any(sparse):
        return None
    if hf_config["num_experts_per_tok"] == 1 and hf_config.get("norm_topk_prob", False):
        raise UserError(
            "The model's config.json sets num_experts_per_tok: 1 with norm_topk_prob: true, which leaves the router "
            "without a gradient. Use a model with other settings."
        )
    return Experts(
        count=count,
        per_token=hf_config["num_experts_per_tok"],
        ffn=hf_config["moe_intermediate_size"],
        normalised=hf_config.get("norm_topk_prob", False),
        layers=sparse,
    )


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 keeps these settings in `rope_parameters`, earlier releases in `rope_scaling`."""
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def _rope_theta(hf_config: Mapping[str, Any]) -> float:
    return float(_rope(hf_config).get("rope_theta") or hf_config["rope_theta"])


def _rope_type(hf_config: Mapping[str, Any]) -> str:
    rope = _rope(hf_config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def max_positions_of(hf_config: Mapping[str, Any]) -> int:
    """Returns the number of positions that a model is made for: the larger of the stated number and the one that rope
    scaling reaches from the original number of positions."""
    stated, rope = int(hf_config["max_position_embeddings"]), _rope(hf_config)
    original = rope.get("original_max_position_embeddings") or stated
    factor = rope.get("factor") or 1.0
    return max(stated, int(original * factor)) if _rope_type(hf_config) in ("linear", "yarn") else stated


def _refuse_variants(hf_config: Mapping[str, Any]) -> None:
    """Raises UserError for settings that change the mathematics and that this Megatron model would silently ignore."""
    layer_types = set(hf_config.get("layer_types") or ())
    rope_type, rope_share = _rope_type(hf_config), _rope(hf_config).get("partial_rotary_factor", 1.0)
    quantisation = hf_config.get("quantization_config")
    method = quantisation.get("quant_method", "unnamed") if isinstance(quantisation, Mapping) else quantisation
    variants = {
        f"quantised weights (quantization_config: {method})": bool(quantisation),
        f"rope scaling {rope_type!r}": rope_type not in ROPE_TYPES,
        f"rope on a part of each head (partial_rotary_factor: {rope_share})": rope_share != 1.0,
        "sliding-window attention (use_sliding_window: true)": hf_config.get("use_sliding_window", False),
        f"layer_types {sorted(layer_types)}": layer_types - {"full_attention"},
        "mlp_bias: true": hf_config.get("mlp_bias", False),
        f"hidden_act: {hf_config.get('hidden_act')}": hf_config.get("hidden_act", "silu") != "silu",
    }
    for what, present in variants.items():
        if present:
            raise UserError(f"The model's config.json requires {what}, which is not supported. Use a model without it.")
