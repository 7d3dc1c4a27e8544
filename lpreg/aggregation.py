"""The only place that normalises a loss.

Legend: T tokens of this part of the batch. Every function returns this part's share of a global mean: the shares of
micro-batches and of data-parallel ranks add up to the exact mean however the batch was split, as long as no sequence is
split. Gradients must be summed over ranks, not averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg._torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def token_mean(token_losses: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Returns the sum of `token_losses` [T] where `mask` [T] holds, divided by `denominator`, the number of tokens in
    the global batch."""
    return torch.where(mask, token_losses, 0.0).sum() / denominator


def sequence_mean_token_mean(
    token_losses: Tensor, mask: Tensor, sequence_ids: Tensor, denominator: float | Tensor
) -> Tensor:
    """Returns the sum of each sequence's mean over tokens, divided by `denominator`, the number of sequences in the
    global batch.

    sequence_ids: [T] integers. A sequence without a token in `mask` adds 0.
    """
    sequence, counts = _sequences(mask, sequence_ids)
    return torch.where(mask, token_losses / counts[sequence].clamp_min(1), 0.0).sum() / denominator


def constant_length_mean(token_losses: Tensor, mask: Tensor, length: int, denominator: float | Tensor) -> Tensor:
    """Returns the sum over tokens, divided by `length` times `denominator`, the number of sequences in the global
    batch.

    A token has the same weight whatever the length of its response (Dr. GRPO, arXiv 2503.20783); `length` is a constant
    of the run, usually the longest response allowed.
    """
    return torch.where(mask, token_losses, 0.0).sum() / (denominator * length)


def mean_of_sequence(values: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Returns for each token the mean of `values` [T] over the tokens of its sequence where `mask` [T] holds; 0 if
    there is no such token. [T]"""
    sequence, counts = _sequences(mask, sequence_ids)
    return _sums(values, mask, sequence, counts)[sequence] / counts.clamp_min(1)[sequence]


def sum_of_sequence(values: Tensor, mask: Tensor, sequence_ids: Tensor) -> Tensor:
    """Returns for each token the sum of `values` [T] over the tokens of its sequence where `mask` [T] holds. [T]"""
    sequence, counts = _sequences(mask, sequence_ids)
    return _sums(values, mask, sequence, counts)[sequence]


def _sums(values: Tensor, mask: Tensor, sequence: Tensor, counts: Tensor) -> Tensor:
    """Returns the sum of the values of each sequence where `mask` holds."""
    return values.new_zeros(counts.shape).index_add(0, sequence, torch.where(mask, values, 0.0))


def _sequences(mask: Tensor, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of each token's sequence among this part's sequences [T], and the number of tokens in `mask` of
    each sequence."""
    ids, sequence = sequence_ids.unique(return_inverse=True)
    return sequence, torch.zeros_like(ids, dtype=torch.int64).index_add(0, sequence, mask.long())
