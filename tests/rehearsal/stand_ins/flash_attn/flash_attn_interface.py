"""FlashAttention over packed sequences. Legend: q [t, h, d], k and v [t, h / groups, d], lse [h, t]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor, None, Tensor]:
    """Returns (output, lse, None, state of the random numbers)."""
    _supported(q.shape[0], cu_seqlens_q, max_seqlen_q, dropout_p, settings)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(q[rows], k[columns], softmax_scale, causal)
        lse[:, rows] = scores.logsumexp(-1)
        weights = (scores - lse[:, rows, None]).exp()
        out[rows] = torch.einsum("hqk,khd->qhd", weights, _repeated(v[columns], q)).to(q.dtype)
    return out, lse, None, torch.zeros(2)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    **settings: Any,
) -> None:
    """Writes the gradients to dq, dk and dv."""
    _supported(q.shape[0], cu_seqlens_q, max_seqlen_q, dropout_p, settings)
    groups = q.shape[1] // k.shape[1]
    for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k):
        keys, values = _repeated(k[columns], q), _repeated(v[columns], q)
        weights = (_scores(q[rows], k[columns], softmax_scale, causal) - softmax_lse[:, rows, None]).exp()
        grad = dout[rows].float()
        delta = (grad * out[rows].float()).sum(-1).t()[..., None]
        dscores = weights * (torch.einsum("qhd,khd->hqk", grad, values) - delta) * softmax_scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, keys).to(dq.dtype)
        for target, gradient in (
            (dk, torch.einsum("hqk,qhd->khd", dscores, q[rows].float())),
            (dv, torch.einsum("hqk,qhd->khd", weights, grad)),
        ):
            target[columns] = gradient.unflatten(1, (-1, groups)).sum(2).to(target.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Any, ...], scale: float, causal: bool) -> Any:
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *bounds, 0.0, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (*bounds, 0.0, scale, causal)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        _flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *ctx.rest)
        return *grads, None, None, None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **settings: Any,
) -> Tensor:
    _supported(q.shape[0], cu_seqlens_q, max_seqlen_q, dropout_p, settings)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _Attention.apply(q, k, v, bounds, scale, causal)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **settings: Any,
) -> Tensor:
    """Takes sequences of one length: [b, s, h, d]."""
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    bounds = (torch.arange(rows + 1) * queries, torch.arange(rows + 1) * keys, queries, keys)
    packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
    return flash_attn_varlen_func(*packed, *bounds, dropout_p, softmax_scale, causal, **settings).view_as(q)


def _flash_attn_forward(*args: Any, **settings: Any) -> None:
    raise NotImplementedError("flash_attn._flash_attn_forward has no stand-in")


_flash_attn_backward = _flash_attn_forward
_UNUSED = {
    "window_size": ((-1, -1), (-1, 0)), "window_size_left": (-1,), "window_size_right": (-1, 0), "softcap": (0.0,),
    "alibi_slopes": (None,), "block_table": (None,), "leftpad_k": (None,), "seqused_k": (None,),
    "return_attn_probs": (False,), "return_softmax": (False,), "zero_tensors": (False,),
    "deterministic": (False, True), "rng_state": None,
}  # fmt: skip
"""Settings that TE passes -> the values under which they change nothing; None allows any."""


def _supported(tokens: int, bounds: Tensor, longest: int, dropout: float, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        allowed = _UNUSED[name]
        if allowed is not None and value not in allowed:
            raise NotImplementedError(f"FlashAttention with {name}={value} has no stand-in")
    if dropout:
        raise NotImplementedError("FlashAttention with dropout has no stand-in")
    ends = bounds.numpy()
    if max(ends[1:] - ends[:-1]) > longest or ends[-1] > tokens:
        raise ValueError(f"FlashAttention would read wrong memory: {tokens} tokens, bounds {ends}, longest {longest}")


def _sequences(bounds_q: Tensor, bounds_k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields the rows of queries and of keys of each sequence."""
    queries, keys = bounds_q.numpy(), bounds_k.numpy()
    for place in range(len(queries) - 1):
        yield slice(queries[place], queries[place + 1]), slice(keys[place], keys[place + 1])


def _repeated(tensor: Tensor, q: Tensor) -> Tensor:
    return tensor.float().repeat_interleave(q.shape[1] // tensor.shape[1], 1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Returns the scaled products [h, queries, keys]. The causal mask ends at the bottom right."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), _repeated(k, q)) * scale
    if not causal:
        return scores
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
    return scores.masked_fill(future, float("-inf"))
