"""Batches of sequences as flat arrays: what the driver sends to the actor and what it gets back.

Legend: N sequences, L tokens of all of them, T sampled tokens among these. Values per sampled token are flat [T],
sequence after sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from megatron_rl.batching.arrays import Array, Indices, Mask
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.types import Ids, Response


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """N sequences of prompt, response and possibly tool tokens, with a mask of the tokens that the policy sampled.

    Raises:
        ValueError: the arrays do not fit together, or the first token of a sequence is sampled: no position predicts
            that token.
    """

    token_ids: Ids
    """int32 [L], sequence after sequence."""
    lengths: Indices
    """int64 [N], number of tokens of each sequence."""
    sampled_mask: Mask
    """bool [L], True for tokens that the policy sampled. Losses, means, selection and metrics count these only."""
    values: dict[str, Array] = field(default_factory=dict)
    """Name -> [T]."""
    proxy: StoredProxy | None = None
    """Sparse proxy distribution of another policy for the T tokens, if the loss needs it."""

    def __post_init__(self) -> None:
        total = int(self.lengths.sum())
        if self.token_ids.shape != (total,) or self.sampled_mask.shape != (total,):
            raise ValueError(
                f"the sequences have {total} tokens, token_ids has shape {self.token_ids.shape} and sampled_mask "
                f"{self.sampled_mask.shape}"
            )
        nonempty = self.starts[self.lengths > 0]
        if self.sampled_mask[nonempty].any():
            raise ValueError("the first token of a sequence cannot be a sampled one: no position predicts it")

    @classmethod
    def joined(cls, sequences: Sequence[Array], sampled_masks: Sequence[Array]) -> SequenceBatch:
        """A batch of these sequences, each with its mask."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        return cls(_joined(sequences, np.int32), lengths, _joined(sampled_masks, np.bool_))

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int] | Array], prompt_lengths: Sequence[int] | Array) -> SequenceBatch:
        """A batch of single-turn sequences: each is a prompt of the given length, then sampled tokens."""
        ids = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        pairs = zip(ids, prompt_lengths, strict=True)
        return cls.joined(ids, [np.arange(len(sequence)) >= prompt for sequence, prompt in pairs])

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Indices:
        """[N], index in `token_ids` of each sequence's first token."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def sampled_lengths(self) -> Indices:
        """[N], number of sampled tokens of each sequence."""
        counts = [np.count_nonzero(self.mask_of(i)) for i in range(len(self))]
        return np.array(counts, dtype=np.int64)

    @cached_property
    def sampled_starts(self) -> Indices:
        """[N], index into the values [T] of each sequence's first sampled token."""
        return np.cumsum(self.sampled_lengths) - self.sampled_lengths

    @property
    def num_sampled_tokens(self) -> int:
        """T."""
        return int(self.sampled_lengths.sum())

    @property
    def targets(self) -> Ids:
        """[T], the sampled tokens."""
        return self.token_ids[self.sampled_mask]

    @property
    def predictors(self) -> Indices:
        """[T], position in its own sequence that predicts each sampled token."""
        return _places(self.lengths)[self.sampled_mask] - 1

    def sequence(self, index: int) -> Ids:
        """A view of one sequence's tokens."""
        start = int(self.starts[index])
        return self.token_ids[start : start + int(self.lengths[index])]

    def mask_of(self, index: int) -> Mask:
        """A view of one sequence's mask."""
        start = int(self.starts[index])
        return self.sampled_mask[start : start + int(self.lengths[index])]

    @property
    def sequences(self) -> list[Ids]:
        """Views of the tokens of every sequence."""
        return [self.sequence(i) for i in range(len(self))]

    def token_index(self, rows: Sequence[int] | Indices) -> Indices:
        """Indices into the values [T] of the sampled tokens of the given sequences, in the order of `rows`."""
        rows = np.asarray(rows, dtype=np.int64)
        return np.repeat(self.sampled_starts[rows], self.sampled_lengths[rows]) + _places(self.sampled_lengths[rows])

    def values_of(self, rows: Sequence[int] | Indices, values: Array) -> Array:
        """[T] -> the values of the given sequences, in the order of `rows`: `values[token_index(rows)]`, but faster."""
        return _gathered(values, _spans(self.sampled_starts, self.sampled_lengths, rows))

    def set_values(self, target: Array, rows: Sequence[int] | Indices, values: Array) -> None:
        """Writes the values of the given sequences, in the order of `rows`, into `target` [T]."""
        done = 0
        for start, end in _spans(self.sampled_starts, self.sampled_lengths, rows):
            target[start:end] = values[done : done + end - start]
            done += end - start

    def per_token(self, per_sequence: Array) -> Array:
        """[N] -> [T]: repeats each sequence's value for each of its sampled tokens."""
        return np.repeat(per_sequence, self.sampled_lengths)

    def take(self, rows: Sequence[int] | Indices) -> SequenceBatch:
        """Returns the given sequences, in the given order, with their values; this batch itself if it is the same."""
        rows = np.asarray(rows, dtype=np.int64)
        if np.array_equal(rows, np.arange(len(self))):
            return self
        tokens = _spans(self.starts, self.lengths, rows)
        return SequenceBatch(
            token_ids=_gathered(self.token_ids, tokens),
            lengths=self.lengths[rows],
            sampled_mask=_gathered(self.sampled_mask, tokens),
            values={name: self.values_of(rows, value) for name, value in self.values.items()},
            proxy=None if self.proxy is None else self.proxy.take(self.token_index(rows)),
        )

    def with_values(self, **values: Array) -> SequenceBatch:
        """Returns the same sequences with more values. Raises ValueError if a value is not [T]."""
        for name, value in values.items():
            if value.shape != (self.num_sampled_tokens,):
                raise ValueError(f"{name} has shape {value.shape}, the batch has {self.num_sampled_tokens} tokens")
        return replace(self, values={**self.values, **values})

    def only(self, names: Collection[str]) -> SequenceBatch:
        """Returns the same sequences with these of their values, so that no others travel."""
        return replace(self, values={name: value for name, value in self.values.items() if name in names})


def sequences_of(pairs: Iterable[tuple[Sequence[int], Response]]) -> SequenceBatch:
    """A batch of prompts' token ids with a response each; `rollout_log_probs` holds the engine's log-probs. A response
    of several sequences makes as many sequences of the batch, one after another.

    Raises:
        ValueError: a response has no log-probs.
    """
    ids: list[Array] = []
    masks: list[Array] = []
    log_probs: list[Array] = []
    lengths: list[int] = []
    before: Sequence[int] | None = None
    prompt, unsampled = np.zeros(0, np.int32), np.zeros(0, bool)
    flat = (
        (response.context_of(prompt_ids), response) for prompt_ids, answer in pairs for response in answer.sequences
    )
    for prompt_ids, response in flat:
        if prompt_ids is not before:  # the responses of a group share their prompt
            prompt, before = np.asarray(prompt_ids, dtype=np.int32), prompt_ids
            unsampled = np.zeros(len(prompt), dtype=bool)
        if len(response.log_probs) != len(response):
            raise ValueError(f"a response of {len(response)} tokens has {len(response.log_probs)} log-probs")
        ids += [prompt, response.token_ids]
        masks += [unsampled, response.sampled_mask]
        log_probs.append(response.sampled(response.log_probs))
        lengths.append(len(prompt) + len(response))
    batch = SequenceBatch(_joined(ids, np.int32), np.array(lengths, dtype=np.int64), _joined(masks, np.bool_))
    return batch.with_values(rollout_log_probs=_joined(log_probs, np.float32))


def _joined(parts: Sequence[Array], dtype: Any) -> Array:
    return np.concatenate([np.zeros(0, dtype=dtype), *(np.asarray(part, dtype=dtype) for part in parts)])


def _places(lengths: Indices) -> Indices:
    """The position of every token in its own sequence, [L]."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _spans(starts: Indices, lengths: Indices, rows: Sequence[int] | Indices) -> list[tuple[int, int]]:
    """(start, end) of the ranges `starts[i] : starts[i] + lengths[i]` for each of `rows`, neighbours as one."""
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        return []
    first = np.flatnonzero(np.diff(rows, prepend=rows[0]) != 1)
    last = np.append(first[1:], len(rows)) - 1
    ends = starts[rows[last]] + lengths[rows[last]]
    return list(zip(starts[rows[first]].tolist(), ends.tolist(), strict=True))


def _gathered(values: Array, spans: Iterable[tuple[int, int]]) -> Array:
    """A copy of these spans, joined."""
    return np.concatenate([values[:0], *(values[start:end] for start, end in spans)])
