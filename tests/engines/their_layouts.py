"""Prints the digests of the tensors that each rank of a server holds, by the server's own layers on a CPU.

    python -m tests.engines.their_layouts sglang|vllm

The layers load the tensors of `weights` with the heads, vocabularies and feed-forward sizes of real models; all other
sizes are small. The ranks of a server are simulated one after another in this process, which has no group.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rl.weight_sync.digest import digest

RANKS = (1, 2, 4, 8)
HEAD_DIM, HIDDEN = 2, 1
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    vocabulary: int
    ffn: int
    bias: bool = False


SHAPES = {
    "Qwen2.5-0.5B": Shape(14, 2, 151_936, 4864, bias=True),
    "Qwen2.5-1.5B": Shape(12, 2, 151_936, 8960, bias=True),
    "Qwen2.5-3B": Shape(16, 2, 151_936, 11_008, bias=True),
    "Qwen2.5-7B": Shape(28, 4, 152_064, 18_944, bias=True),
    "Qwen2.5-14B": Shape(40, 8, 152_064, 13_824, bias=True),
    "Qwen2.5-32B": Shape(40, 8, 152_064, 27_648, bias=True),
    "Qwen3-0.6B": Shape(16, 8, 151_936, 3072),
    "Qwen3-4B": Shape(32, 8, 151_936, 9728),
    "Qwen3-14B": Shape(40, 8, 151_936, 17_408),
    "Qwen3-32B": Shape(64, 8, 151_936, 25_600),
    "Qwen3-30B-A3B": Shape(32, 4, 151_936, 6144),
    "Qwen3-235B-A22B": Shape(64, 4, 151_936, 12_288),
    "Llama-3.2-1B": Shape(32, 8, 128_256, 8192),
    "Llama-3.2-3B": Shape(24, 8, 128_256, 8192),
    "Llama-3.1-8B": Shape(32, 8, 128_256, 14_336),
    "Llama-3.1-70B": Shape(64, 8, 128_256, 28_672),
    "a small model": Shape(6, 6, 100, 48),
}
"""Qwen3-1.7B and 8B have the heads and the vocabulary of Qwen3-0.6B and 4B."""
CASES = [(name, ranks) for name in SHAPES for ranks in RANKS if name != "a small model"] + [("a small model", 3)]
"""Models and numbers of ranks. Three ranks do not divide the small model's vocabulary, padded to a multiple of 64."""


def weights(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in the order in which the actor sends them."""
    torch.manual_seed(0)
    yield "model.embed_tokens.weight", torch.randn(shape.vocabulary, HIDDEN)
    for kind in ("weight", "bias") if shape.bias else ("weight",):
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            width = (HIDDEN,) if kind == "weight" else ()
            yield f"{ATTENTION}.{name}_proj.{kind}", torch.randn(heads * HEAD_DIM, *width)
    yield f"{ATTENTION}.o_proj.weight", torch.randn(HIDDEN, shape.heads * HEAD_DIM)
    for name in ("gate", "up"):
        yield f"{MLP}.{name}_proj.weight", torch.randn(shape.ffn, HIDDEN)
    yield f"{MLP}.down_proj.weight", torch.randn(HIDDEN, shape.ffn)
    yield "lm_head.weight", torch.randn(shape.vocabulary, HIDDEN)


def held(shape: Shape, rank: int, linear: Any, vocabulary: Any) -> dict[str, str]:
    """Digests of what a rank holds, once its layers are made from a server's modules and have loaded the tensors."""
    sent = dict(weights(shape))
    qkv = linear.QKVParallelLinear(HIDDEN, HEAD_DIM, shape.heads, shape.kv_heads, bias=shape.bias)
    gate_up = linear.MergedColumnParallelLinear(HIDDEN, [shape.ffn, shape.ffn], bias=False)
    layers = {
        "model.embed_tokens": vocabulary.VocabParallelEmbedding(shape.vocabulary, HIDDEN),
        "lm_head": vocabulary.ParallelLMHead(shape.vocabulary, HIDDEN),
        f"{ATTENTION}.o_proj": linear.RowParallelLinear(shape.heads * HEAD_DIM, HIDDEN, bias=False),
        f"{MLP}.down_proj": linear.RowParallelLinear(shape.ffn, HIDDEN, bias=False),
    }
    for name, layer in layers.items():
        layer.weight.weight_loader(layer.weight, sent[f"{name}.weight"])
    for kind in ("weight", "bias") if shape.bias else ("weight",):
        parameter = getattr(qkv, kind)
        for part in "qkv":
            parameter.weight_loader(parameter, sent[f"{ATTENTION}.{part}_proj.{kind}"], part)
    for number, name in enumerate(("gate", "up")):
        gate_up.weight.weight_loader(gate_up.weight, sent[f"{MLP}.{name}_proj.weight"], number)
    layers |= {f"{ATTENTION}.qkv_proj": qkv, f"{MLP}.gate_up_proj": gate_up}
    return {
        f"{rank}:{layer_name}.{name}": digest(parameter)
        for layer_name, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }


@contextmanager
def vllm_rank(rank: int, ranks: int) -> Iterator[tuple[Any, Any]]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    with ExitStack() as stack:
        for module in (linear, vocab_parallel_embedding, parameter):
            for name, value in (("rank", rank), ("world_size", ranks)):
                stack.enter_context(
                    mock.patch.object(module, f"get_tensor_model_parallel_{name}", lambda value=value: value)
                )
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        yield linear, vocab_parallel_embedding


@contextmanager
def sglang_rank(rank: int, ranks: int) -> Iterator[tuple[Any, Any]]:
    from sglang.srt.layers import linear, vocab_parallel_embedding

    place = {"rank": rank, "size": ranks, "group": None}
    parallel = SimpleNamespace(**{f"{kind}_{key}": value for kind in ("tp", "attn_tp") for key, value in place.items()})
    with ExitStack() as stack:
        for module in (linear, vocab_parallel_embedding):
            stack.enter_context(mock.patch.object(module, "get_parallel", lambda: parallel))
        yield linear, vocab_parallel_embedding


def main(simulated_rank: Callable[..., Any]) -> dict[str, dict[str, str] | None]:
    """Digests by `model, ranks`; None if the server refuses so many ranks."""
    found: dict[str, dict[str, str] | None] = {}
    for name, ranks in CASES:
        digests: dict[str, str] = {}
        try:
            for rank in range(ranks):
                with simulated_rank(rank, ranks) as modules:
                    digests |= held(SHAPES[name], rank, *modules)
            found[f"{name}, {ranks}"] = digests
        except AssertionError:
            found[f"{name}, {ranks}"] = None
    return found


if __name__ == "__main__":
    print("digests:", json.dumps(main(sglang_rank if sys.argv[1] == "sglang" else vllm_rank)))
