"""The likeliest next tokens, with the vocabulary split over ranks. Legend: n positions, V vocabulary, k candidates."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel import process_groups


@torch.no_grad()
def top_candidates(
    logits: Tensor, count: int, *, temperature: float, vocabulary: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Returns token ids [n, k] and fp32 log-probs [n, k] of the likeliest next tokens, the likeliest first; k <= V.

    Collective over `group`, the ranks that share the vocabulary. All of them get the same result.

    Args:
        logits: [n, V / TP], this rank's columns of the raw logits, padding of the vocabulary included.
        count: Number of candidates per position.
        temperature: Temperature of the log-probs.
        vocabulary: V, without padding.
        group: Process group of the ranks that share the vocabulary.
    """
    first = group.rank() * logits.shape[1]
    x = logits.float() / temperature
    x[:, max(0, vocabulary - first) :] = -torch.inf  # columns of padding
    highest, columns = x.topk(min(count, x.shape[1]), dim=-1)

    def over_ranks(local: Tensor) -> Tensor:
        return torch.cat(process_groups.gather_shards(local.contiguous(), group), dim=-1)

    total = over_ranks(x.logsumexp(-1, keepdim=True)).logsumexp(-1, keepdim=True)
    best, places = over_ranks(highest).topk(min(count, vocabulary), dim=-1)
    return over_ranks(columns + first).gather(-1, places), best - total
