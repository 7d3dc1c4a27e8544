"""The only place that normalises a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def token_mean(token_losses: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """This part's share of the global token-mean: the sum of `token_losses` [T] where `mask` [T], over `denominator`.

    The denominator is the count of response tokens in the whole global batch of an update, so the shares of
    micro-batches and of data-parallel ranks add up to the exact mean however the batch was split. Gradients must be
    summed over ranks, not averaged.
    """
    return torch.where(mask, token_losses, 0.0).sum() / denominator
