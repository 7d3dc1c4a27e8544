"""Hugging Face names <-> Megatron names: one declarative table per family, read by import, export, weight sync and
conversion alike. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_rl.actor.architecture import Architecture

Kind = Literal["replicated", "row", "vocab", "qkv", "gate_up"]
"""How a Megatron tensor is made of Hugging Face ones and shared out; `fusion.py` does it."""

Only = Literal["", "qkv bias", "output bias", "dense", "sparse", "untied"]
"""What a model must have for the rule to hold: a bias, a kind of layer, an LM head of its own."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The first `*` stands for the layer, the second for the expert. Both are counted within the rank in Megatron's
    name, within the whole model in Hugging Face's."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    only: Only = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule at one place of a whole model."""

    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(_fill(name, self.layer, self.expert) for name in self.rule.hf)


def _layer(megatron: str, hf: str, kind: Kind, only: Only = "") -> Rule:
    return Rule(f"decoder.layers.*.{megatron}", tuple(f"model.layers.*.{name}" for name in hf.split()), kind, only)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QKV_WEIGHTS = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"
_QKV_BIASES = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
_EXPERT_GATE_UP = "mlp.experts.*.gate_proj.weight mlp.experts.*.up_proj.weight"
_EXPERT_DOWN = "mlp.experts.*.down_proj.weight"

_COMMON = (
    Rule("embedding.word_embeddings.weight", (EMBEDDING,), "vocab"),
    _layer("input_layernorm.weight", "input_layernorm.weight", "replicated"),
    _layer("self_attention.linear_qkv.weight", _QKV_WEIGHTS, "qkv"),
    _layer("self_attention.linear_qkv.bias", _QKV_BIASES, "qkv", "qkv bias"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "row"),
    _layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "replicated", "output bias"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "replicated"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Rule("output_layer.weight", (HEAD,), "vocab", "untied"),
)
_DENSE = (
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", "gate_up", "dense"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", "row", "dense"),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "replicated"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "replicated"),
)
_SPARSE = (
    _layer("mlp.router.weight", "mlp.gate.weight", "replicated", "sparse"),
    _layer("mlp.experts.local_experts.*.linear_fc1.weight", _EXPERT_GATE_UP, "gate_up", "sparse"),
    _layer("mlp.experts.local_experts.*.linear_fc2.weight", _EXPERT_DOWN, "row", "sparse"),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "Qwen3ForCausalLM": (*_COMMON, *_DENSE, *_QK_NORM),
    "Qwen3MoeForCausalLM": (*_COMMON, *_DENSE, *_QK_NORM, *_SPARSE),
    "Qwen2ForCausalLM": (*_COMMON, *_DENSE),
    "LlamaForCausalLM": (*_COMMON, *_DENSE),
}

TRANSFORMER_ENGINE_NAMES = {
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.*.input_layernorm.weight",
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "decoder.layers.*.pre_mlp_layernorm.weight",
    "decoder.layers.*.mlp.experts.linear_fc1.weight*": "decoder.layers.*.mlp.experts.local_experts.*.linear_fc1.weight",
    "decoder.layers.*.mlp.experts.linear_fc2.weight*": "decoder.layers.*.mlp.experts.local_experts.*.linear_fc2.weight",
}
"""Transformer Engine keeps a norm inside the linear layer after it, and all experts in one module: its name -> ours."""


def rule_of(architecture: Architecture, megatron: str) -> Rule:
    """The rule of a Megatron name with its numbers replaced by `*`."""
    megatron = TRANSFORMER_ENGINE_NAMES.get(megatron, megatron)
    rule = next((rule for rule in FAMILIES[architecture.family] if rule.megatron == megatron), None)
    if rule is None:
        raise RuntimeError(f"no rule for the parameter {megatron} of a {architecture.family}")
    return rule


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Everything a whole model consists of."""
    for rule in FAMILIES[architecture.family]:
        if not _holds(rule, architecture):
            continue
        if "*" not in rule.megatron:
            yield Entry(rule)
            continue
        for layer in range(architecture.layers):
            if rule.only in ("dense", "sparse") and (rule.only == "sparse") != architecture.is_sparse(layer):
                continue
            if rule.megatron.count("*") == 1:
                yield Entry(rule, layer)
            elif architecture.experts is not None:
                yield from (Entry(rule, layer, expert) for expert in range(architecture.experts.count))


def _holds(rule: Rule, architecture: Architecture) -> bool:
    match rule.only:
        case "qkv bias":
            return architecture.qkv_bias
        case "output bias":
            return architecture.output_bias
        case "untied":
            return not architecture.tied
    return True


def _fill(pattern: str, *numbers: int | None) -> str:
    for number in numbers:
        pattern = pattern.replace("*", str(number), 1)
    return pattern
