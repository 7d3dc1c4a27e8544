from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.actor import platform, process_groups
from megatron_rl.actor.architecture import SUPPORTED, Architecture
from megatron_rl.actor.layout import Layout, padded_vocabulary
from megatron_rl.actor.model import build_model
from megatron_rl.checkpoint import weight_map
from megatron_rl.checkpoint.weight_map import FAMILIES, export_hf_weights, import_values, load_hf_weights
from megatron_rl.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    platform.prepare("cpu")
    meeting: Path = tmp_path_factory.mktemp("groups") / "rendezvous"
    process_groups.init_process_groups(Layout(), rank=0, world_size=1, init_method=f"file://{meeting}", device=CPU)
    yield
    process_groups.destroy()


def hf_config(family: str = "Qwen3ForCausalLM", tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": [family],
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": tied,
    }


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A whole model's weights, written out by hand so as to be independent of the table."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (37, 32), "model.norm.weight": (32,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (37, 32)
    for layer in range(3):
        names: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (32,),
            "post_attention_layernorm.weight": (32,),
            "self_attn.q_proj.weight": (32, 32),
            "self_attn.k_proj.weight": (16, 32),
            "self_attn.v_proj.weight": (16, 32),
            "self_attn.o_proj.weight": (32, 32),
            "mlp.gate_proj.weight": (48, 32),
            "mlp.up_proj.weight": (48, 32),
            "mlp.down_proj.weight": (32, 48),
        }
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            names |= {"self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,)}
        else:
            names |= {f"self_attn.{x}_proj.bias": (32 if x == "q" else 16,) for x in "qkv"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in names.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def stage(config: dict[str, Any]) -> torch.nn.Module:
    return build_model(config, layout=Layout(), dtype=torch.float32, device=CPU)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_supported_family_has_a_table() -> None:
    assert set(FAMILIES) == set(SUPPORTED.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_loaded_is_exported(family: str, tied: bool) -> None:
    config = hf_config(family, tied)
    model, tensors = stage(config), hf_tensors(config)
    load_hf_weights(model, config, tensors)
    assert_same(dict(export_hf_weights(model, config)), tensors)


def test_other_values_travel_like_the_weights() -> None:
    """Optimizer moments: out under Hugging Face names, back as the same shards, the parameters untouched."""
    config = hf_config()
    model, weights = stage(config), hf_tensors(config)
    load_hf_weights(model, config, weights)
    moments = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    exported = dict(export_hf_weights(model, config, moments))
    assert exported.keys() == weights.keys()
    assert_same(import_values(model, config, exported), moments)
    assert_same(dict(export_hf_weights(model, config)), weights)


def test_exports_and_imports_own_their_memory() -> None:
    config = hf_config()
    model, weights = stage(config), hf_tensors(config)
    load_hf_weights(model, config, weights)
    exported, imported = dict(export_hf_weights(model, config)), import_values(model, config, weights)
    for tensor in (*exported.values(), *imported.values()):
        tensor.zero_()
    assert_same(weights, hf_tensors(config))
    assert_same(dict(export_hf_weights(model, config)), weights)


def test_a_tied_model_ignores_a_stored_lm_head() -> None:
    config = hf_config(tied=True)
    model, weights = stage(config), hf_tensors(config)
    load_hf_weights(model, config, weights | {"lm_head.weight": torch.full((37, 32), 9.0)})
    assert_same(dict(export_hf_weights(model, config)), weights)


def test_every_missing_and_unexpected_name_is_listed() -> None:
    config = hf_config()
    weights = hf_tensors(config)
    del weights["lm_head.weight"], weights["model.layers.2.mlp.up_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.layers.3.input_layernorm.weight"] = torch.zeros(32)
    with pytest.raises(UserError) as refusal:
        load_hf_weights(stage(config), config, weights)
    assert str(refusal.value).split("\n  ")[1:] == [
        "missing: lm_head.weight",
        "missing: model.layers.2.mlp.up_proj.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "unexpected: model.layers.3.input_layernorm.weight",
    ]


def test_every_wrong_shape_is_listed() -> None:
    config = hf_config()
    weights = hf_tensors(config)
    weights["model.embed_tokens.weight"] = torch.zeros(38, 32)
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(32, 32)
    with pytest.raises(UserError) as refusal:
        load_hf_weights(stage(config), config, weights)
    assert str(refusal.value).split("\n  ")[1:] == [
        "model.embed_tokens.weight: shape (38, 32), expected (37, 32)",
        "model.layers.1.self_attn.k_proj.weight: shape (32, 32), expected (16, 32)",
    ]


def test_a_value_of_the_wrong_shape_is_refused() -> None:
    config = hf_config()
    model = stage(config)
    values = {name: p.detach() for name, p in model.named_parameters()}
    values["decoder.final_layernorm.weight"] = torch.zeros(31)
    with pytest.raises(ValueError, match=r"final_layernorm.* has shape \(31,\), not \(32,\)"):
        list(export_hf_weights(model, config, values))


@settings(max_examples=60, deadline=None)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    kv_per_rank=st.integers(1, 2),
    queries=st.integers(1, 3),
    vocabulary=st.integers(5, 50),
    kind=st.sampled_from(["replicated", "row", "vocab", "gate_up", "qkv", "qkv bias"]),
)
def test_join_undoes_split(tensor: int, kv_per_rank: int, queries: int, vocabulary: int, kind: str) -> None:
    """For any number of ranks: the shards are of one shape, and together they are the whole tensors again."""
    kv_heads = tensor * kv_per_rank
    model = Architecture(
        family="Qwen3ForCausalLM",
        layers=1,
        hidden=6,
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        head_dim=2,
        ffn=tensor * 3,
        vocabulary=vocabulary,
        max_positions=8,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=False,
    )
    rest = () if kind == "qkv bias" else (6,)
    rows = {
        "replicated": [5],
        "row": [5],
        "vocab": [vocabulary],
        "gate_up": [model.ffn] * 2,
        "qkv": [model.heads * 2, kv_heads * 2, kv_heads * 2],
    }[kind.split()[0]]
    width = (tensor * 2,) if kind == "row" else rest
    whole = [torch.randn(n, *width) for n in rows]
    rule_kind: Any = kind.split()[0]
    shards = [weight_map._split(rule_kind, whole, model, tensor, rank) for rank in range(tensor)]
    assert len({shard.shape for shard in shards}) == 1
    expected = weight_map._full_shapes(rule_kind, tuple(shards[0].shape), model, tensor)
    assert [tuple(t.shape) for t in whole] == expected
    for found, wanted in zip(weight_map._join(rule_kind, shards, model), whole, strict=True):
        assert torch.equal(found, wanted)
    if kind == "vocab":
        padded = torch.cat(shards)
        assert len(padded) == padded_vocabulary(vocabulary, tensor)
        assert not padded[vocabulary:].any()
