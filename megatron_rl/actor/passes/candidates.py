"""The likeliest next tokens, over a vocabulary split over ranks. n positions, V vocabulary, k candidates."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel import process_groups


@torch.no_grad()
def top_candidates(
    logits: Tensor, count: int, *, temperature: float, vocabulary: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """logits [n, V / TP], raw -> (token ids [n, k], log-probs [n, k] fp32), the likeliest first; k is at most V.

    Collective over `group`, the ranks of the vocabulary; every rank gets the same.
    """
    first = group.rank() * logits.shape[1]
    x = logits.float() / temperature
    x[:, max(0, vocabulary - first) :] = -torch.inf  # padding
    highest, columns = x.topk(min(count, x.shape[1]), dim=-1)

    def over_ranks(local: Tensor) -> Tensor:
        return torch.cat(process_groups.gather_shards(local.contiguous(), group), dim=-1)

    total = over_ranks(x.logsumexp(-1, keepdim=True)).logsumexp(-1, keepdim=True)
    best, places = over_ranks(highest).topk(min(count, vocabulary), dim=-1)
    return over_ranks(columns + first).gather(-1, places), best - total
