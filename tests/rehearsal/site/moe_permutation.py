"""Torch arithmetic in place of Transformer Engine's Triton kernels that sort tokens by expert.

Each function takes the arguments of the one that it replaces, whatever their order in a release. The maps that they
pass each other have a format of their own: [tokens, experts], the row among the sorted rows, or -1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def replace(kernels: ModuleType) -> None:
    """Replaces the functions that a release has. Its other functions of the same kind then raise by name."""
    for name, original in inspect.getmembers(kernels, inspect.isfunction):
        if original.__module__ == kernels.__name__:
            setattr(kernels, name, _standing_in(name, inspect.signature(original)))


def _standing_in(name: str, signature: inspect.Signature) -> Callable[..., Any]:
    def call(*args: Any, **settings: Any) -> Any:
        if name not in FUNCTIONS:
            raise NotImplementedError(f"transformer_engine.pytorch.triton.permutation.{name} has no stand-in")
        bound = signature.bind(*args, **settings).arguments
        if bound.get("pad_offsets") is not None or bound.get("scale") is not None:
            raise NotImplementedError(f"{name} with FP8 padding or scales has no stand-in")
        return FUNCTIONS[name](SimpleNamespace(**bound))

    return call


def _make_row_id_map(a: SimpleNamespace) -> Tensor:
    chosen = a.routing_map.bool()
    rows = chosen.t().reshape(-1).cumsum(0).view(a.num_experts, a.num_tokens).t() - 1
    return torch.where(chosen, rows, rows.new_full((), -1))


def _places(row_id_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the token, expert and sorted row of every pair."""
    pairs = torch.argwhere(row_id_map >= 0)
    tokens, experts = pairs[:, 0], pairs[:, 1]
    return tokens, experts, row_id_map[tokens, experts]


def _permute(a: SimpleNamespace) -> tuple[Tensor, None, Tensor | None]:
    tokens, experts, rows = _places(a.row_id_map)
    out = a.inp.new_zeros(a.num_out_tokens, a.hidden_size)
    out[rows] = a.inp[tokens]
    if a.probs is None:
        return out, None, None
    probs = a.probs.new_zeros(a.num_out_tokens)
    probs[rows] = a.probs[tokens, experts]
    return out, None, probs


def _unpermute(a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    tokens, experts, rows = _places(a.row_id_map)
    parts = a.inp[rows].float()
    if a.merging_probs is not None:
        parts = parts * a.merging_probs[tokens, experts].float()[:, None]
    out = parts.new_zeros(a.num_tokens, a.hidden_size).index_add_(0, tokens, parts).to(a.inp.dtype)
    if a.permuted_probs is None:
        return out, None
    probs = a.permuted_probs.new_zeros(a.num_tokens, a.num_experts)
    probs[tokens, experts] = a.permuted_probs[rows]
    return out, probs


def _unpermute_backward(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    tokens, experts, rows = _places(a.row_id_map)
    grad, probs = a.fwd_output_grad[tokens].float(), a.merging_probs[tokens, experts].float()
    out = a.fwd_output_grad.new_zeros(a.num_out_tokens, a.hidden_size)
    out[rows] = (grad * probs[:, None]).to(out.dtype)
    dprobs = a.merging_probs.new_zeros(a.num_tokens, a.num_experts)
    dprobs[tokens, experts] = (grad * a.fwd_input[rows].float()).sum(-1).to(dprobs.dtype)
    return out, dprobs


def _make_chunk_sort_map(a: SimpleNamespace) -> Tensor:
    """Returns the sorted row of every row."""
    chunks = torch.arange(a.num_tokens).split(a.split_sizes.int().numpy().tolist())
    order = torch.cat([chunks[place] for place in a.sorted_indices.numpy()])
    return torch.empty_like(order).index_copy_(0, order, torch.arange(a.num_tokens))


def _sort_by_map(a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    forward = getattr(a, "is_forward", False)  # before Transformer Engine 2.5 only backward passes call this

    def sort(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return torch.empty_like(values).index_copy_(0, a.row_id_map, values) if forward else values[a.row_id_map]

    return sort(a.inp), sort(a.probs)  # type: ignore[return-value]


def _sort_by_idx(a: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor | None]:
    """Does both of the above, as releases before 2.5 do."""
    row_id_map = _make_chunk_sort_map(a)
    out, probs = _sort_by_map(SimpleNamespace(inp=a.inp, probs=a.probs, row_id_map=row_id_map, is_forward=True))
    return out, row_id_map, probs


FUNCTIONS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "make_row_id_map": _make_row_id_map,
    "permute_with_mask_map": _permute,
    "unpermute_with_mask_map": _unpermute,
    "unpermute_with_mask_map_bwd_with_merging_probs": _unpermute_backward,
    "make_chunk_sort_map": _make_chunk_sort_map,
    "sort_chunks_by_map": _sort_by_map,
    "sort_chunks_by_idx": _sort_by_idx,
}
