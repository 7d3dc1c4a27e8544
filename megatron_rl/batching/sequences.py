"""Ragged rows: what the driver sends to the actors and what it gets back.

Legend: N rows, T response tokens over all rows. Per-token values are flat, row after row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.types import Sample

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SequenceBatch:
    """N sequences (prompt and response) with values on their T response tokens."""

    tokens: list[npt.NDArray[np.int64]]
    """N arrays [length], prompt then response."""
    prompt_lengths: npt.NDArray[np.int64]
    """[N], each at least 1: the first response token needs a position that predicts it."""
    values: dict[str, Array] = field(default_factory=dict)
    """Name -> [T]."""
    proxy: StoredProxy | None = None
    """Over the T tokens; another policy's, where the loss wants more of it than a value a token."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[N], prompt and response."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)

    @cached_property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """[N]."""
        return self.lengths - self.prompt_lengths

    @property
    def num_response_tokens(self) -> int:
        """T."""
        return int(self.response_lengths.sum())

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """[T], the response tokens."""
        if not self.tokens:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([row[start:] for row, start in zip(self.tokens, self.prompt_lengths, strict=True)])

    def token_index(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the response tokens of `rows` lie in the flat values, in the order of `rows`."""
        ends = np.cumsum(self.response_lengths)
        starts = ends - self.response_lengths
        parts = [np.arange(starts[i], ends[i]) for i in rows]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def per_token(self, per_row: Array) -> Array:
        """[N] -> [T], each row's value on each of its response tokens."""
        return np.repeat(per_row, self.response_lengths)

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> SequenceBatch:
        """The given rows, in the given order, with their values."""
        index = self.token_index(rows)
        return SequenceBatch(
            tokens=[self.tokens[i] for i in rows],
            prompt_lengths=self.prompt_lengths[list(rows)],
            values={name: value[index] for name, value in self.values.items()},
            proxy=None if self.proxy is None else self.proxy.take(index),
        )

    def with_values(self, **values: Array) -> SequenceBatch:
        """The same rows with more values."""
        for name, value in values.items():
            if value.shape != (self.num_response_tokens,):
                raise ValueError(f"{name} has shape {value.shape}, the rows have {self.num_response_tokens} tokens")
        return replace(self, values={**self.values, **values})


def rows_of(samples: Sequence[Sample]) -> SequenceBatch:
    """The samples as rows, with the engine's log-probs as `rollout_log_probs`."""
    return SequenceBatch(
        tokens=[np.array([*s.prompt.token_ids, *s.generation.token_ids], dtype=np.int64) for s in samples],
        prompt_lengths=np.array([len(s.prompt.token_ids) for s in samples], dtype=np.int64),
        values={
            "rollout_log_probs": np.array([lp for s in samples for lp in s.generation.log_probs], dtype=np.float32),
        },
    )
