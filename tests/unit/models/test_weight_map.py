from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.actor.model.policy import build_model
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import SUPPORTED, Architecture
from megatron_rl.models.families import FAMILIES
from megatron_rl.models.fused_experts import as_stored
from megatron_rl.models.fusion import join, split
from megatron_rl.models.weight_map import export_hf_weights, import_values, load_hf_weights
from megatron_rl.parallel.layout import Layout, padded_vocabulary
from tests.hf_models import config_json, hf_model
from tests.meeting import only_rank

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def single_rank() -> Iterator[None]:
    with only_rank():
        yield


SHAPE = {"vocab_size": 37, "num_hidden_layers": 3}


def hf_config(model_type: str = "qwen3", tied: bool = False, **changes: Any) -> dict[str, Any]:
    return config_json(model_type, tie_word_embeddings=tied, **(SHAPE | changes))


def hf_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Returns a whole model's weights as transformers names them, so independently of the tables under test."""
    model = hf_model(seed=seed, noise=0.1, **{key: value for key, value in config.items() if key != "architectures"})
    return as_stored({name: parameter.detach() for name, parameter in model.named_parameters()})


def stage(config: dict[str, Any]) -> torch.nn.Module:
    return build_model(config, layout=Layout(), dtype=torch.float32, device=CPU)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_supported_family_has_a_table() -> None:
    assert set(FAMILIES) == set(SUPPORTED.values())


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize(
    "changes",
    [{"tied": True}, {"tied": False}, {"attention_bias": True}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}],
    ids=str,
)
def test_exported_weights_equal_loaded_weights(model_type: str, changes: dict[str, Any]) -> None:
    config = hf_config(model_type, **changes)
    model, tensors = stage(config), hf_tensors(config)
    load_hf_weights(model, config, tensors)
    assert_same(dict(export_hf_weights(model, config)), tensors)


def test_optimizer_moments_are_exported_and_imported_like_weights() -> None:
    """Moments are exported under Hugging Face names and imported as the same shards; the parameters do not change."""
    config = hf_config()
    model, weights = stage(config), hf_tensors(config)
    load_hf_weights(model, config, weights)
    moments = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    exported = dict(export_hf_weights(model, config, moments))
    assert exported.keys() == weights.keys()
    assert_same(dict(import_values(model, config, exported)), moments)
    assert_same(dict(export_hf_weights(model, config)), weights)


def test_imported_values_do_not_share_memory() -> None:
    config = hf_config()
    model, weights = stage(config), hf_tensors(config)
    load_hf_weights(model, config, weights)
    for tensor in dict(import_values(model, config, weights)).values():
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
    with pytest.raises(UserError) as error:
        load_hf_weights(stage(config), config, weights)
    assert str(error.value).split("\n  ")[1:] == [
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
    with pytest.raises(UserError) as error:
        load_hf_weights(stage(config), config, weights)
    assert str(error.value).split("\n  ")[1:] == [
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


@given(
    tensor=st.sampled_from([1, 2, 4]),
    kv_per_rank=st.integers(1, 2),
    queries=st.integers(1, 3),
    vocabulary=st.integers(5, 50),
    kind=st.sampled_from(["replicated", "row", "vocab", "gate_up", "qkv", "qkv bias"]),
)
def test_join_undoes_split(tensor: int, kv_per_rank: int, queries: int, vocabulary: int, kind: str) -> None:
    """For any number of ranks the shards have one shape, and joining them restores the full tensors."""
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
    full = [torch.randn(n, *width) for n in rows]
    rule_kind: Any = kind.split()[0]
    shards = [split(rule_kind, full, model, tensor, rank) for rank in range(tensor)]
    assert len({shard.shape for shard in shards}) == 1
    for found, expected in zip(join(rule_kind, shards, model), full, strict=True):
        assert torch.equal(found, expected)
    if kind == "vocab":
        padded = torch.cat(shards)
        assert len(padded) == padded_vocabulary(vocabulary, tensor)
        assert not padded[vocabulary:].any()
