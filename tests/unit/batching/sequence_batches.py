"""Random batches of sequences, with any mask of sampled tokens that a batch accepts."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_rl.batching.sequences import SequenceBatch

Mask = list[bool]
"""One value per token of a sequence; the first is always False."""


def _multi_turn(runs: list[tuple[int, int]]) -> Mask:
    """`runs`: (tokens given to the policy, tokens sampled) of each turn."""
    mask = [sampled for given, own in runs for sampled in [False] * given + [True] * own]
    return [False, *mask[1:]]


single_turn = st.tuples(st.integers(1, 5), st.integers(1, 6)).map(lambda turn: _multi_turn([turn]))
multi_turn = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=3).map(_multi_turn)
arbitrary = st.lists(st.booleans(), max_size=9).map(lambda rest: [False, *rest])
none_sampled = st.integers(1, 6).map(lambda length: [False] * length)
masks = st.one_of(single_turn, multi_turn, arbitrary, none_sampled)


def batch_of(shape: list[Mask]) -> SequenceBatch:
    """No token id occurs twice, so that a misplaced token is noticed; `value` is ten times each sampled token's id."""
    ends = np.cumsum([len(mask) for mask in shape], dtype=np.int64)
    ids = [np.arange(end - len(mask), end) for end, mask in zip(ends, shape, strict=True)]
    batch = SequenceBatch.joined(ids, shape)
    return batch.with_values(value=batch.targets * 10.0)


@st.composite
def batches_with_rows(draw: st.DrawFn, shapes: st.SearchStrategy[list[Mask]]) -> tuple[SequenceBatch, list[int]]:
    """A batch, and the indices of some of its sequences in any order."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    return batch_of(shape), order[: draw(st.integers(0, len(order)))]
