"""The tree of sequences with common prefixes, compared with the set of their prefixes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.prefix_tree import PrefixTree

Row = tuple[int, ...]

rows_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), max_size=12)
"""Sequences of few different tokens: many share a prefix, some are a prefix of another, and some are equal."""


def tree_of(rows: list[Row]) -> PrefixTree:
    return PrefixTree.of([np.array(row, dtype=np.int64) for row in rows])


def prefixes(row: Row) -> list[Row]:
    """The prefixes that end in an input token; the last token is a target only."""
    return [row[: i + 1] for i in range(len(row) - 1)]


@given(rows_lists)
def test_every_prefix_has_one_position(rows: list[Row]) -> None:
    tree = tree_of(rows)
    assert sorted(tree.order) == list(range(len(rows)))
    place: dict[Row, int] = {}
    for row, path in zip(tree.order, tree.paths, strict=True):
        assert len(path) == len(rows[row]) - 1
        for prefix, position in zip(prefixes(rows[row]), path.tolist(), strict=True):
            assert place.setdefault(prefix, position) == position
    assert sorted(place.values()) == list(range(tree.size))
    for prefix, position in place.items():
        assert tree.depths[position] == len(prefix) - 1


@given(rows_lists)
def test_a_position_is_seen_by_the_positions_up_to_its_end(rows: list[Row]) -> None:
    tree = tree_of(rows)
    seen = {(int(q), int(k)) for path in tree.paths for i, q in enumerate(path) for k in path[: i + 1]}
    by_ends = {(q, k) for k in range(tree.size) for q in range(k, int(tree.ends[k]))}
    assert by_ends == seen


@given(rows_lists, st.integers(1, 20))
def test_runs_are_adjacent_sequences_that_share_a_prefix_within_the_limit(rows: list[Row], longest: int) -> None:
    tree = tree_of(rows)
    runs = tree.runs(longest)
    assert [i for run in runs for i in run] == list(range(len(rows)))
    for run in runs:
        seen = {int(position) for i in run for position in tree.paths[i]}
        assert len(run) == 1 or len(seen) <= longest
        assert all(tree.shared[i] > 0 for i in run[1:])


@given(st.lists(st.integers(0, 9), max_size=8))
def test_separate_sequences_share_nothing(lengths: list[int]) -> None:
    tree = PrefixTree.separate(np.array(lengths, dtype=np.int32))
    assert tree.size == sum(lengths)
    assert [path.tolist() for path in tree.paths] == [
        list(range(sum(lengths[:i]), sum(lengths[: i + 1]))) for i in range(len(lengths))
    ]
