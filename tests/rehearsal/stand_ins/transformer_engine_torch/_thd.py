"""Helpers of attention over packed sequences (THD) whose halves context-parallel ranks exchange.

Legend: lse [h, t] log of the sum of exponentials; cu_seqlens bounds of this rank's sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def _halves(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields the start, middle and end of each sequence."""
    bounds = [int(bound) for bound in cu_seqlens.numpy()]
    for start, end in pairwise(bounds):
        yield start, (start + end) // 2, end


def _tokens_dim(tensor: Tensor) -> int:
    """Returns the dimension of the tokens: keys and values come one by one [t, h, d] or stacked [2, t, h, d]."""
    return 0 if tensor.ndim == 3 else 1


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    dim = _tokens_dim(tensor)
    halves = [((a, m), (m, b))[half_idx] for a, m, b in _halves(cu_seqlens)]
    return torch.cat([tensor.narrow(dim, start, end - start) for start, end in halves], dim)


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    _packed(lse_packed)
    return torch.cat([lse[:, m:b] for _, m, b in _halves(cu_seqlens)], 1)


def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Adds a step's exponentials to those of the second halves."""
    _packed(lse_packed)
    at = 0
    for _, m, b in _halves(cu_seqlens):
        lse[:, m:b] = torch.logaddexp(lse[:, m:b].float(), lse_per_step[:, at : at + b - m].float())
        at += b - m


def thd_out_correction(out: Tensor, out_per_step: Tensor, *arguments: object) -> None:
    """Adds a step's output, weighted by its share of the exponentials.

    The other arguments are (lse, lse_per_step, cu_seqlens, only_second_half, lse_packed). In newer releases the lse of
    the output so far precedes them; the output is then rescaled here instead of after the last step.
    """
    old = arguments[0] if len(arguments) == 6 else None
    lse, lse_per_step, cu_seqlens, only_second_half, lse_packed = arguments[-5:]
    assert isinstance(lse, Tensor) and isinstance(lse_per_step, Tensor) and isinstance(cu_seqlens, Tensor)
    _packed(bool(lse_packed))
    at = 0
    for a, m, b in _halves(cu_seqlens):
        first = m if only_second_half else a
        count = b - first
        share = (lse_per_step[:, at : at + count].float() - lse[:, first:b].float()).exp().t()[..., None]
        part = out_per_step[at : at + count].float() * share
        before = out[first:b].float()
        if isinstance(old, Tensor):
            before = before * (old[:, first:b].float() - lse[:, first:b].float()).exp().t()[..., None]
        out[first:b] = (before + part).to(out.dtype)
        at += count


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Adds or copies a step's gradient to the halves; "none" leaves a half alone."""
    dim, at = _tokens_dim(grad), 0
    for a, m, b in _halves(cu_seqlens):
        for start, end, how in ((a, m, first_half), (m, b, second_half)):
            if how == "none":
                continue
            part, place = grad_per_step.narrow(dim, at, end - start), grad.narrow(dim, start, end - start)
            at += end - start
            place.add_(part) if how == "add" else place.copy_(part)


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, (start, _, end) in enumerate(_halves(cu_seqlens)):
        out[row, : end - start] = tensor[start:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    out = tensor.new_zeros(t, *tensor.shape[2:])
    for row, (start, _, end) in enumerate(_halves(cu_seqlens)):
        out[start:end] = tensor[row, : end - start]
    return out


def _packed(lse_packed: bool) -> None:
    if not lse_packed:
        raise NotImplementedError("context parallelism with a padded lse has no stand-in")
