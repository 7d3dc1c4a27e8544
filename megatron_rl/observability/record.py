"""What of a step's rollouts is recorded: all of it, or of a large step some whole groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_rl.batching.rows import Array, Rows
from megatron_rl.observability.rollouts import write_rollouts
from megatron_rl.types import Sample


def record(
    folder: Path,
    step: int,
    samples: Sequence[Sample],
    advantages: Array,
    batch: Rows,
    seen: Mapping[str, Array],
    *,
    most_tokens: int,
) -> Path:
    """Write a dump of at most so many response tokens (one group at least), and return its path.

    advantages: [N]. batch: the N samples as rows, with `selected` where a loss selects. seen: name -> [T], what the
    actor said of each token.
    """
    rows = recorded_rows([sample.group for sample in samples], batch.response_lengths, step, most_tokens)
    index, part = batch.token_index(rows), batch.take(rows)
    columns = {"actor_log_probs" if name == "log_probs" else name: values[index] for name, values in seen.items()}
    if "kept" in columns:  # NaN where the actor did not look, which a bool cannot say
        columns["kept"] = columns["kept"].astype(np.float32)
    if "selected" in part.values:
        columns["selected"] = part.values["selected"]
    ends = np.cumsum(part.response_lengths)[:-1]
    per_token = {name: np.split(values, ends) for name, values in columns.items()}
    return write_rollouts(folder, step, [samples[i] for i in rows], advantages[rows].tolist(), per_token)


def recorded_rows(groups: Sequence[int], lengths: Array, step: int, most_tokens: int) -> Array:
    """Rows of whole groups with at most so many tokens together, or of the smallest; every step draws groups anew."""
    number = np.asarray(groups)
    if lengths.sum() <= most_tokens:
        return np.arange(len(number))
    sizes = {int(group): int(lengths[number == group].sum()) for group in np.unique(number)}
    kept: list[int] = []
    for group in np.random.default_rng(step).permutation(list(sizes)).tolist():
        if sum(sizes[other] for other in kept) + sizes[group] <= most_tokens:
            kept.append(group)
    return np.flatnonzero(np.isin(number, kept or min(sizes, key=lambda group: sizes[group])))
