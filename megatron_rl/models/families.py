"""Maps Hugging Face names to Megatron names and back, with one declarative table per model family.

Import, export, weight sync and conversion all read these tables. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_rl.models.architecture import Architecture

Kind = Literal["replicated", "row", "vocab", "qkv", "gate_up"]
"""How a Megatron tensor is built from Hugging Face tensors and split over ranks; see `fusion.py`."""

Only = Literal["", "qkv bias", "output bias", "dense", "sparse", "untied"]
"""What a model must have for a rule to apply: a bias, a kind of layer, or a separate LM head."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """Maps one Megatron parameter to the Hugging Face tensors that it is built from.

    The first `*` in a name stands for the layer, the second for the expert. Megatron's names count both within the
    rank, Hugging Face's names within the whole model.
    """

    megatron: str
    hf: tuple[str, ...]
    dims: tuple[str, ...]
    """The dimensions of each Hugging Face tensor, one letter per dimension; see `_sizes`."""
    kind: Kind
    only: Only = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """A rule applied to one layer or expert of a whole model."""

    rule: Rule
    layer: int | None = None
    expert: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(_fill(name, self.layer, self.expert) for name in self.rule.hf)

    def hf_shapes(self, architecture: Architecture) -> tuple[Shape, ...]:
        sizes = _sizes(architecture)
        return tuple(tuple(sizes[letter] for letter in dims) for dims in self.rule.dims)


def _sizes(model: Architecture) -> dict[str, int]:
    """Returns the size behind each letter.

    V vocabulary, H hidden size, Q queries of all heads, K keys of all heads, D head size, F feed-forward size,
    E number of experts, M feed-forward size of an expert.
    """
    sizes = {"V": model.vocabulary, "H": model.hidden, "D": model.head_dim, "F": model.ffn}
    sizes |= {"Q": model.heads * model.head_dim, "K": model.kv_heads * model.head_dim}
    if model.experts:
        sizes |= {"E": model.experts.count, "M": model.experts.ffn}
    return sizes


def _rule(megatron: str, hf: str, kind: Kind, only: Only = "") -> Rule:
    """Builds a rule; `hf` lists tensors as "name[dimensions]", separated by spaces."""
    names, dims = zip(*(tensor.rstrip("]").split("[") for tensor in hf.split()), strict=True)
    return Rule(megatron, names, dims, kind, only)


def _layer(megatron: str, hf: str, kind: Kind, only: Only = "") -> Rule:
    prefixed = " ".join(f"model.layers.*.{tensor}" for tensor in hf.split())
    return _rule(f"decoder.layers.*.{megatron}", prefixed, kind, only)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QKV_WEIGHTS = "self_attn.q_proj.weight[QH] self_attn.k_proj.weight[KH] self_attn.v_proj.weight[KH]"
_QKV_BIASES = "self_attn.q_proj.bias[Q] self_attn.k_proj.bias[K] self_attn.v_proj.bias[K]"
_EXPERT = "mlp.experts.local_experts.*"
_EXPERT_GATE_UP = "mlp.experts.*.gate_proj.weight[MH] mlp.experts.*.up_proj.weight[MH]"

_COMMON = (
    _rule("embedding.word_embeddings.weight", f"{EMBEDDING}[VH]", "vocab"),
    _layer("input_layernorm.weight", "input_layernorm.weight[H]", "replicated"),
    _layer("self_attention.linear_qkv.weight", _QKV_WEIGHTS, "qkv"),
    _layer("self_attention.linear_qkv.bias", _QKV_BIASES, "qkv", "qkv bias"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight[HQ]", "row"),
    _layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias[H]", "replicated", "output bias"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight[H]", "replicated"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight[FH] mlp.up_proj.weight[FH]", "gate_up", "dense"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight[HF]", "row", "dense"),
    _rule("decoder.final_layernorm.weight", "model.norm.weight[H]", "replicated"),
    _rule("output_layer.weight", f"{HEAD}[VH]", "vocab", "untied"),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight[D]", "replicated"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight[D]", "replicated"),
)
_SPARSE = (
    _layer("mlp.router.weight", "mlp.gate.weight[EH]", "replicated", "sparse"),
    _layer(f"{_EXPERT}.linear_fc1.weight", _EXPERT_GATE_UP, "gate_up", "sparse"),
    _layer(f"{_EXPERT}.linear_fc2.weight", "mlp.experts.*.down_proj.weight[HM]", "row", "sparse"),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "Qwen3ForCausalLM": (*_COMMON, *_QK_NORM),
    "Qwen3MoeForCausalLM": (*_COMMON, *_QK_NORM, *_SPARSE),
    "Qwen2ForCausalLM": _COMMON,
    "LlamaForCausalLM": _COMMON,
}

TRANSFORMER_ENGINE_NAMES = {
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.*.input_layernorm.weight",
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "decoder.layers.*.pre_mlp_layernorm.weight",
    "decoder.layers.*.mlp.experts.linear_fc1.weight*": f"decoder.layers.*.{_EXPERT}.linear_fc1.weight",
    "decoder.layers.*.mlp.experts.linear_fc2.weight*": f"decoder.layers.*.{_EXPERT}.linear_fc2.weight",
}
"""Transformer Engine's name -> the name in these tables.

Transformer Engine keeps a norm inside the linear layer after it, and all experts in one module.
"""


def rule_of(architecture: Architecture, megatron: str) -> Rule:
    """Returns the rule for a Megatron name whose numbers are replaced by `*`. Raises RuntimeError if there is none."""
    megatron = TRANSFORMER_ENGINE_NAMES.get(megatron, megatron)
    rule = next((rule for rule in FAMILIES[architecture.family] if rule.megatron == megatron), None)
    if rule is None:
        raise RuntimeError(f"no rule for the parameter {megatron} of a {architecture.family}")
    return rule


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Yields the entries of a whole model in order: the embedding, each layer, then the final norm and the LM head."""
    rules = [rule for rule in FAMILIES[architecture.family] if _holds(rule, architecture)]
    before, after = _outside_layers(rules)
    yield from map(Entry, before)
    for layer in range(architecture.layers):
        kind = "sparse" if architecture.is_sparse(layer) else "dense"
        for rule in rules:
            if "*" not in rule.megatron or rule.only in {"dense", "sparse"} - {kind}:
                continue
            if rule.megatron.count("*") == 1:
                yield Entry(rule, layer)
            elif architecture.experts is not None:
                yield from (Entry(rule, layer, expert) for expert in range(architecture.experts.count))
    yield from map(Entry, after)


def parameters(architecture: Architecture) -> int:
    """Returns the number of parameters of the whole model."""
    return sum(math.prod(shape) for entry in entries(architecture) for shape in entry.hf_shapes(architecture))


def _outside_layers(rules: list[Rule]) -> tuple[list[Rule], list[Rule]]:
    outside = [rule for rule in rules if "*" not in rule.megatron]
    return [rule for rule in outside if rule.hf == (EMBEDDING,)], [rule for rule in outside if rule.hf != (EMBEDDING,)]


def _holds(rule: Rule, architecture: Architecture) -> bool:
    match rule.only:
        case "qkv bias":
            return architecture.qkv_bias
        case "output bias":
            return architecture.output_bias
        case "untied":
            return not architecture.tied
        case "sparse":
            return architecture.experts is not None
    return True


def _fill(pattern: str, *numbers: int | None) -> str:
    for number in numbers:
        pattern = pattern.replace("*", str(number), 1)
    return pattern
