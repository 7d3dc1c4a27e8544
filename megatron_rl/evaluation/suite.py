"""A suite's metrics from its graded samples and the actor's view of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from megatron_rl.batching.rows import Array, Rows
from megatron_rl.types import Sample


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of k responses drawn from the `samples` is correct (unbiased; Chen et al. 2021)."""
    if k > samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def accuracy(samples: Sequence[Sample], k: int) -> dict[str, float]:
    """`avg@k`, `pass@k`, response length and share of truncated responses."""
    correct: dict[int, list[float]] = {}
    for sample in samples:
        if sample.reward is None:
            raise ValueError(f"a sample of {sample.prompt.id} was not graded")
        correct.setdefault(sample.group, []).append(sample.reward.score)
    return {
        f"avg@{k}": float(np.mean([np.mean(scores) for scores in correct.values()])),
        f"pass@{k}": float(np.mean([pass_at_k(len(s), sum(x > 0.5 for x in s), k) for s in correct.values()])),
        "response_length": float(np.mean([len(s.generation.token_ids) for s in samples])),
        "truncated_fraction": float(np.mean([s.generation.finish_reason == "length" for s in samples])),
    }


def follows(rows: Rows, token: int) -> Array:
    """[T] bool: the token before this response token is `token`."""
    previous = [row[start - 1 : -1] for row, start in zip(rows.tokens, rows.prompt_lengths, strict=True)]
    return np.concatenate(previous) == token if previous else np.zeros(0, dtype=bool)


def probe_rows(rows: Rows, after: int, token: int) -> tuple[Rows, Array]:
    """The rows in which a response token comes after `after`, scored for `token`, and where [T] of them that is."""
    place = follows(rows, after)
    ends = np.cumsum(rows.response_lengths)
    starts = ends - rows.response_lengths
    chosen = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if place[start:end].any()]
    part = rows.take(chosen)
    return part.with_values(probe_targets=np.full(part.num_response_tokens, token)), place[rows.token_index(chosen)]
