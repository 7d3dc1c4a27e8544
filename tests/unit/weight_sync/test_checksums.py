"""Checksums of a server's fused tensors, taken from Hugging Face tensors that pass one at a time."""

from __future__ import annotations

import hashlib

import pytest
import torch

from megatron_rl.weight_sync.checksums import (
    Checksums,
    ChecksumTaker,
    NotComparable,
    WeightsDamaged,
    compare,
    rank_pieces,
)
from megatron_rl.weight_sync.digest import digest

LAYER = "model.layers.3"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, VOCABULARY = 4, 2, 8, 32, 48, 70


def model() -> dict[str, torch.Tensor]:
    """Tensors in the order in which the actor sends them."""
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{LAYER}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.q_proj.bias": (HEADS * HEAD_DIM,),
        f"{LAYER}.self_attn.k_proj.bias": (KV_HEADS * HEAD_DIM,),
        f"{LAYER}.self_attn.v_proj.bias": (KV_HEADS * HEAD_DIM,),
        f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{LAYER}.mlp.gate_proj.weight": (FFN, HIDDEN),
        f"{LAYER}.mlp.up_proj.weight": (FFN, HIDDEN),
        f"{LAYER}.mlp.down_proj.weight": (HIDDEN, FFN),
        f"{LAYER}.input_layernorm.weight": (HIDDEN,),
        f"{LAYER}.mlp.experts.0.up_proj.weight": (FFN, HIDDEN),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def taken(ranks: int) -> Checksums:
    taker = ChecksumTaker(ranks)
    for name, tensor in model().items():
        taker.add(name, tensor)
    return taker.result()


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_checksums_are_those_of_each_ranks_tensors(ranks: int) -> None:
    sent, w = taken(ranks), model()
    for rank in range(ranks):
        qkv = torch.cat([w[f"{LAYER}.self_attn.{n}_proj.weight"].chunk(ranks)[rank] for n in "qkv"])
        gate_up = torch.cat([w[f"{LAYER}.mlp.{n}_proj.weight"].chunk(ranks)[rank] for n in ("gate", "up")])
        embedding = torch.zeros(128, HIDDEN)
        embedding[:VOCABULARY] = w["model.embed_tokens.weight"]
        held = {
            "self_attn.qkv_proj.weight": qkv,
            "self_attn.qkv_proj.bias": torch.cat(
                [w[f"{LAYER}.self_attn.{n}_proj.bias"].chunk(ranks)[rank] for n in "qkv"]
            ),
            "self_attn.o_proj.weight": w[f"{LAYER}.self_attn.o_proj.weight"].chunk(ranks, 1)[rank],
            "mlp.gate_up_proj.weight": gate_up,
            "mlp.down_proj.weight": w[f"{LAYER}.mlp.down_proj.weight"].chunk(ranks, 1)[rank],
            "input_layernorm.weight": w[f"{LAYER}.input_layernorm.weight"],
        }
        names = {f"{rank}:{LAYER}.{name}": digest(tensor) for name, tensor in held.items()}
        names[f"{rank}:model.embed_tokens.weight"] = digest(embedding.chunk(ranks)[rank])
        assert names == {name: value for name, value in sent.fused.items() if name.startswith(f"{rank}:")}


def test_plain_checksums_are_those_of_the_tensors() -> None:
    assert taken(1).plain == {name: digest(tensor) for name, tensor in model().items()}


def test_a_checksum_depends_on_values_not_on_strides() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor)
    assert digest(torch.zeros(0, 3)) == f"sha256:{hashlib.sha256().hexdigest()}"


def test_an_engine_with_more_ranks_than_heads_of_k_and_v_replicates_them() -> None:
    taker, w = ChecksumTaker(4, KV_HEADS), model()
    for name, tensor in w.items():
        taker.add(name, tensor)
    for rank in range(4):
        parts = [w[f"{LAYER}.self_attn.q_proj.weight"].chunk(4)[rank]]
        parts += [w[f"{LAYER}.self_attn.{n}_proj.weight"].chunk(KV_HEADS)[rank // 2] for n in "kv"]
        assert taker.result().fused[f"{rank}:{LAYER}.self_attn.qkv_proj.weight"] == digest(torch.cat(parts))


@pytest.mark.parametrize(
    ("vocabulary", "ranks", "rows"),
    [(151_936, 1, 151_936), (151_936, 4, 37_984), (151_936, 8, 18_992), (70, 2, 64), (64, 3, 64), (200, 8, 32)],
)
def test_the_vocabulary_is_padded_to_a_multiple_of_64_and_of_the_ranks_only_if_necessary(
    vocabulary: int, ranks: int, rows: int
) -> None:
    embedding = torch.arange(1, vocabulary + 1)
    pieces = rank_pieces("embed_tokens", embedding, ranks, ranks)
    assert [len(piece) for piece in pieces] == [rows] * ranks
    together = torch.cat(pieces)
    assert torch.equal(together[:vocabulary], embedding) and not together[vocabulary:].any()


def test_tensors_may_share_their_memory() -> None:
    """The actor gathers every tensor into the same memory."""
    taker, memory = ChecksumTaker(2), torch.empty(FFN * HIDDEN)
    for name, tensor in model().items():
        if "embed" not in name:
            held = memory[: tensor.numel()].view(tensor.shape).copy_(tensor)
            taker.add(name, held)
    expected = taken(2).fused
    assert taker.result().fused == {name: value for name, value in expected.items() if "embed" not in name}


def test_a_difference_is_named_and_shortened_checksums_compare() -> None:
    start, other = "0123456789abcdef", "fedcba9876543210"
    sent = {"a": f"sha256:{start}{other}", "b": f"sha256:{other}"}
    assert compare(sent, {"a": f"sha256:{start}", "b": f"sha256:{other}", "buffer": "sha256:77"}, 4) == 2
    with pytest.raises(WeightsDamaged, match="version 4 arrived damaged: 1 of 2 tensors differ, the first is b"):
        compare(sent, {"a": f"sha256:{start}", "b": f"sha256:{start}"}, 4)


def test_a_few_digits_prove_nothing() -> None:
    with pytest.raises(WeightsDamaged, match="1 of 1"):
        compare({"a": "sha256:0123456789abcdef"}, {"a": "sha256:0"}, 1)


@pytest.mark.parametrize("held", [{}, {"c": "sha256:1"}])
def test_nothing_to_compare_is_an_error(held: dict[str, str]) -> None:
    with pytest.raises(WeightsDamaged, match="the engine knows none of the names"):
        compare({"a": "sha256:1"}, held, 1)
    with pytest.raises(WeightsDamaged, match="1 of 1"):
        compare({"a": "sha256:1"}, {"a": "sha256:"}, 1)


def test_checksums_of_another_algorithm_are_neither_right_nor_wrong() -> None:
    """An equal number of digits must not look like damage, nor an equal digit like agreement."""
    with pytest.raises(NotComparable, match="the kind sha256, the engine of the kind tiles"):
        compare({"a": "sha256:12", "b": "sha256:34"}, {"a": "tiles:12", "b": "tiles:35"}, 3)


def test_checksums_of_stages_are_merged() -> None:
    merged = Checksums.merge([Checksums({"a": "1"}, {"0:a": "2"}), Checksums({"b": "3"}, {})])
    assert merged == Checksums({"a": "1", "b": "3"}, {"0:a": "2"})
