"""Hugging Face names <-> Megatron names: one table per family, for import, export and weight sync alike.

Fused layouts (G key/value groups, n = heads / G, D = head_dim, r = tensor rank):
  qkv      group after group, its n query heads, its key head, its value head: [G, (n + 2) * D, ...]; ranks share groups
  gate_up  rank r holds its rows of gate, then its rows of up
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_rl.actor import process_groups
from megatron_rl.actor.architecture import Architecture
from megatron_rl.actor.layout import padded_vocabulary
from megatron_rl.errors import UserError

Kind = Literal["replicated", "row", "vocab", "qkv", "gate_up"]
"""row: a row-parallel layer, the matrix's columns over ranks; vocab: its rows, after padding with rows of zeros."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`*` stands for the layer number: within the stage in Megatron's name, within the model in Hugging Face's."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


def _layer(megatron: str, hf: str, kind: Kind) -> Rule:
    return Rule(f"decoder.layers.*.{megatron}", tuple(f"model.layers.*.{name}" for name in hf.split()), kind)


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QKV_WEIGHTS = "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"
_QKV_BIASES = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"

_COMMON = (
    Rule("embedding.word_embeddings.weight", (_EMBEDDING,), "vocab"),
    _layer("input_layernorm.weight", "input_layernorm.weight", "replicated"),
    _layer("self_attention.linear_qkv.weight", _QKV_WEIGHTS, "qkv"),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "row"),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "replicated"),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight mlp.up_proj.weight", "gate_up"),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", "row"),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Rule("output_layer.weight", (_HEAD,), "vocab"),
    # Transformer Engine keeps a norm inside the linear layer that follows it.
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "replicated"),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "replicated"),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {
    "Qwen3ForCausalLM": (
        *_COMMON,
        _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "replicated"),
        _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "replicated"),
    ),
    "Qwen2ForCausalLM": (*_COMMON, _layer("self_attention.linear_qkv.bias", _QKV_BIASES, "qkv")),
}


def load_hf_weights(model: GPTModel, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's parameters. `hf_tensors` may be lazy: only what this stage holds is read, one at a time.

    Raises UserError listing every tensor that is missing, unexpected or mis-shaped.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, shard in _local_shards(model, hf_config, hf_tensors):
            parameters[name].copy_(shard)


def import_values(model: GPTModel, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `export_hf_weights(model, values)` gave, as this rank's shards by Megatron name; the layout may differ from
    the one exported. Errors as `load_hf_weights`."""
    return {name: shard.clone() for name, shard in _local_shards(model, hf_config, hf_tensors)}


@torch.no_grad()
def export_hf_weights(
    model: GPTModel, hf_config: Mapping[str, Any], values: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """This pipeline stage's tensors under their Hugging Face names, whole, one at a time, each with its own memory.

    Collective over the tensor-parallel group: every rank of it must exhaust the iterator, and gets every tensor.
    `values`: tensors to export in place of the parameters (a snapshot, optimizer moments), by Megatron name and of the
    parameters' local shapes.
    """
    architecture = Architecture.from_hf(hf_config)
    for name, parameter in model.named_parameters():
        rule, hf_names = _rule_for(model, architecture, name)
        if architecture.tied and rule.hf == (_HEAD,):
            continue  # the last stage's copy of the embedding; the first stage exports it
        local = parameter.detach() if values is None else values[name]
        if local.shape != parameter.shape:
            raise ValueError(f"value for {name} has shape {tuple(local.shape)}, not {tuple(parameter.shape)}")
        shards = [local] if rule.kind == "replicated" else process_groups.gather_shards(local)
        full = _join(rule.kind, shards, architecture)
        yield from ((hf_name, tensor.clone()) for hf_name, tensor in zip(hf_names, full, strict=True))


def _local_shards(
    model: GPTModel, hf_config: Mapping[str, Any], hf_tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    architecture, group = Architecture.from_hf(hf_config), process_groups.tp_group()
    tp, rank = group.size(), group.rank()
    _check_names(architecture, hf_tensors)
    problems = []
    for name, parameter in model.named_parameters():
        rule, hf_names = _rule_for(model, architecture, name)
        if architecture.tied and rule.hf == (_HEAD,):
            hf_names = (_EMBEDDING,)
        tensors = [hf_tensors[hf_name] for hf_name in hf_names]
        wanted = _full_shapes(rule.kind, tuple(parameter.shape), architecture, tp)
        wrong = [
            f"{hf_name}: shape {tuple(tensor.shape)}, expected {shape}"
            for hf_name, tensor, shape in zip(hf_names, tensors, wanted, strict=True)
            if tuple(tensor.shape) != shape
        ]
        problems += wrong
        if not problems:
            yield name, _split(rule.kind, tensors, architecture, tp, rank)
    if problems:
        raise UserError("The weights do not fit the model's config.json:\n  " + "\n  ".join(problems))


def _rule_for(model: GPTModel, architecture: Architecture, name: str) -> tuple[Rule, tuple[str, ...]]:
    """The rule of one Megatron parameter, and its Hugging Face names with the layer's number in the whole model."""
    pattern = re.sub(r"(?<=^decoder\.layers\.)\d+", "*", name)
    rule = next((rule for rule in FAMILIES[architecture.family] if rule.megatron == pattern), None)
    if rule is None:
        raise RuntimeError(f"no rule for the parameter {name} of a {architecture.family}")
    if pattern == name:
        return rule, rule.hf
    layer = model.decoder.layers[int(name.split(".")[2])].layer_number - 1
    return rule, tuple(hf_name.replace("*", str(layer)) for hf_name in rule.hf)


def _check_names(architecture: Architecture, hf_tensors: Mapping[str, Tensor]) -> None:
    """Every rank checks the whole model's names, so all of them stop together."""
    patterns = {hf_name for rule in FAMILIES[architecture.family] for hf_name in rule.hf}
    expected = {p.replace("*", str(layer)) for p in patterns for layer in range(architecture.layers)}
    needed = expected - {_HEAD} if architecture.tied else expected
    problems = [f"missing: {name}" for name in sorted(needed - hf_tensors.keys())]
    problems += [f"unexpected: {name}" for name in sorted(hf_tensors.keys() - expected)]
    if problems:
        raise UserError(f"The weights are not those of a {architecture.family}:\n  " + "\n  ".join(problems))


def _full_shapes(kind: Kind, local: tuple[int, ...], model: Architecture, tp: int) -> list[tuple[int, ...]]:
    rest = local[1:]
    match kind:
        case "replicated":
            return [local]
        case "row":
            return [(local[0], local[1] * tp)]
        case "vocab":
            return [(model.vocabulary, *rest)]
        case "gate_up":
            return [(model.ffn, *rest)] * 2
        case "qkv":
            return [(heads * model.head_dim, *rest) for heads in (model.heads, model.kv_heads, model.kv_heads)]


def _split(kind: Kind, tensors: list[Tensor], model: Architecture, tp: int, rank: int) -> Tensor:
    """Whole Hugging Face tensors -> this rank's Megatron tensor."""
    first = tensors[0]
    match kind:
        case "replicated":
            return first
        case "row":
            return first.chunk(tp, dim=1)[rank]
        case "vocab":
            rows = padded_vocabulary(model.vocabulary, tp) // tp
            held = first[rank * rows : (rank + 1) * rows]
            return torch.cat([held, held.new_zeros(rows - held.shape[0], *held.shape[1:])])
        case "gate_up":
            return torch.cat([tensor.chunk(tp)[rank] for tensor in tensors])
        case "qkv":
            by_group = torch.cat([tensor.unflatten(0, (model.kv_heads, -1)) for tensor in tensors], dim=1)
            return by_group.chunk(tp)[rank].flatten(0, 1)


def _join(kind: Kind, shards: list[Tensor], model: Architecture) -> tuple[Tensor, ...]:
    """Every rank's Megatron tensor -> whole Hugging Face tensors; the inverse of `_split`."""
    match kind:
        case "replicated":
            return (shards[0],)
        case "row":
            return (torch.cat(shards, dim=1),)
        case "vocab":
            return (torch.cat(shards)[: model.vocabulary],)
        case "gate_up":
            return tuple(torch.cat(halves) for halves in zip(*(shard.chunk(2) for shard in shards), strict=True))
        case "qkv":
            by_group = torch.cat(shards).unflatten(0, (model.kv_heads, -1))
            query_rows = model.heads // model.kv_heads * model.head_dim
            parts = by_group.split([query_rows, model.head_dim, model.head_dim], dim=1)
            return tuple(part.flatten(0, 1) for part in parts)
