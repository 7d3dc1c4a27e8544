"""Where in the responses a probability is followed."""

from __future__ import annotations

import numpy as np

from megatron_rl.batching.sequences import Array, SequenceBatch


def follows(rows: SequenceBatch, token: int) -> Array:
    """[T] bool: the token before this response token is `token`."""
    previous = [row[start - 1 : -1] for row, start in zip(rows.tokens, rows.prompt_lengths, strict=True)]
    return np.concatenate(previous) == token if previous else np.zeros(0, dtype=bool)


def probe_rows(rows: SequenceBatch, after: int, token: int) -> tuple[SequenceBatch, Array]:
    """The rows in which a response token comes after `after`, scored for `token`, and where [T] of them that is."""
    place = follows(rows, after)
    ends = np.cumsum(rows.response_lengths)
    starts = ends - rows.response_lengths
    chosen = [i for i, (start, end) in enumerate(zip(starts, ends, strict=True)) if place[start:end].any()]
    part = rows.take(chosen)
    return part.with_values(probe_targets=np.full(part.num_response_tokens, token)), place[rows.token_index(chosen)]
