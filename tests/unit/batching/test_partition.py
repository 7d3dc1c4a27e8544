"""The partition into micro-batches per rank: complete, within the budget, balanced and deterministic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.balance import balanced, row_costs
from megatron_rl.batching.bins import first_fit, length_buckets
from megatron_rl.batching.partition import PARTS, MicroBatches, partition, partition_trees
from megatron_rl.batching.prefix_tree import PrefixTree

lengths_lists = st.lists(st.integers(1, 50), max_size=40)
budgets = st.integers(1, 200)
plans = st.fixed_dictionaries(
    {
        "token_budget": budgets,
        "packed": st.booleans(),
        "count_multiple": st.integers(1, 4),
        "same_count": st.booleans(),
    }
)


def size(rows: list[int], lengths: list[int], packed: bool) -> int:
    of_rows = [lengths[row] for row in rows]
    return sum(of_rows) if packed else len(rows) * max(of_rows, default=0)


def load(share: MicroBatches, lengths: list[int]) -> int:
    return sum(lengths[row] for rows in share for row in rows)


@given(lengths_lists, st.integers(1, 6), plans)
def test_every_sequence_is_in_one_micro_batch_within_the_budget(
    lengths: list[int], ranks: int, plan: dict[str, Any]
) -> None:
    shares = partition(lengths, ranks, **plan)
    assert len(shares) == ranks
    micro_batches = [rows for share in shares for rows in share]
    assert sorted(row for rows in micro_batches for row in rows) == list(range(len(lengths)))
    sizes = [size(rows, lengths, plan["packed"]) for rows in micro_batches if len(rows) > 1]
    assert all(tokens <= plan["token_budget"] for tokens in sizes)


@given(lengths_lists, st.integers(1, 6), plans)
def test_counts_are_as_requested_and_the_largest_micro_batches_come_first(
    lengths: list[int], ranks: int, plan: dict[str, Any]
) -> None:
    shares = partition(lengths, ranks, **plan)
    counts = [len(share) for share in shares]
    assert all(count % plan["count_multiple"] == 0 for count in counts)
    assert not plan["same_count"] or len(set(counts)) == 1
    for share in shares:
        tokens = [size(rows, lengths, packed=True) for rows in share]
        assert tokens == sorted(tokens, reverse=True)


@given(lengths_lists, st.integers(1, 6), plans)
def test_equal_lengths_give_equal_partitions(lengths: list[int], ranks: int, plan: dict[str, Any]) -> None:
    assert partition(lengths, ranks, **plan) == partition(tuple(lengths), ranks, **plan)


@given(lengths_lists, budgets, st.integers(1, 6))
def test_loads_of_ranks_differ_by_at_most_one_sequence(lengths: list[int], budget: int, ranks: int) -> None:
    loads = [load(share, lengths) for share in partition(lengths, ranks, token_budget=budget)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths_lists, budgets, st.integers(1, 6))
def test_padded_loads_of_ranks_differ_by_at_most_one_micro_batch(lengths: list[int], budget: int, ranks: int) -> None:
    shares = partition(lengths, ranks, token_budget=budget, packed=False)
    loads = [sum(size(rows, lengths, packed=False) for rows in share) for share in shares]
    largest = max((size(rows, lengths, packed=False) for share in shares for rows in share), default=0)
    assert max(loads) - min(loads) <= largest


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_that_fits_into_one_micro_batch_is_still_partitioned(packed: bool) -> None:
    shares = partition([10] * 8, 4, token_budget=1000, packed=packed)
    assert [sum(len(rows) for rows in share) for share in shares] == [2, 2, 2, 2]


def test_attention_makes_long_sequences_cost_more() -> None:
    lengths = [100, 50, 50, 50]
    by_length = partition(lengths, 2, token_budget=1000)
    assert sorted(load(share, lengths) for share in by_length) == [100, 150]
    costs = row_costs(np.array(lengths), even_length=50)
    assert costs.tolist() == [300, 100, 100, 100]
    assert sorted(partition(lengths, 2, token_budget=1000, costs=costs)) == [[[0]], [[1, 2, 3]]]


@given(lengths_lists, budgets)
def test_a_rank_has_as_few_micro_batches_as_first_fit(lengths: list[int], budget: int) -> None:
    (share,) = partition(lengths, 1, token_budget=budget)
    assert len(share) == len(first_fit(np.array(lengths, dtype=np.int64), budget))
    # A new bin is opened only for a sequence that fits into no other: all bins but one are at least half full.
    half_empty = [rows for rows in share if size(rows, lengths, packed=True) * 2 < min(budget, max(lengths))]
    assert len(half_empty) <= 1


@given(lengths_lists, budgets)
def test_a_bucket_is_closed_only_when_it_is_full(lengths: list[int], budget: int) -> None:
    buckets = length_buckets(np.array(lengths, dtype=np.int64), budget)
    for bucket in buckets[:-1]:
        assert (len(bucket) + 1) * lengths[bucket[0]] > budget


@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 9))
def test_balanced_parts_differ_by_at_most_one_item(costs: list[float], parts: int) -> None:
    groups = balanced(np.array(costs), parts)
    assert sorted(index for group in groups for index in group) == list(range(len(costs)))
    sums = [sum(costs[index] for index in group) for group in groups]
    assert max(sums) - min(sums) <= max(costs, default=0) * (1 + 1e-9)


groups = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(0, 8), min_size=1, max_size=6)),
    max_size=6,
)
"""(prompt, length of each response)."""


def rows_of_groups(groups: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [
        np.concatenate([prompt, random.integers(1, 3, length)]).astype(np.int64)
        for prompt, responses in groups
        for length in responses
    ]


@given(groups, st.integers(1, 5), budgets, st.integers(1, 3), st.booleans())
def test_every_sequence_that_shares_positions_is_in_one_micro_batch(
    groups: list[tuple[list[int], list[int]]], ranks: int, budget: int, count_multiple: int, same_count: bool
) -> None:
    rows = rows_of_groups(groups)
    counts: dict[str, Any] = {"count_multiple": count_multiple, "same_count": same_count}
    shares = partition_trees(rows, ranks, token_budget=budget, **counts)
    micro_batches = [part for share in shares for part in share]
    assert len(shares) == ranks and sorted(i for part in micro_batches for i in part) == list(range(len(rows)))
    assert all(len(share) % count_multiple == 0 for share in shares)
    assert not same_count or len({len(share) for share in shares}) == 1
    for part in micro_batches:
        assert PrefixTree.of([rows[i] for i in part]).size <= max(budget, max((len(rows[i]) for i in part), default=0))


def test_a_group_stays_together_if_ranks_have_several_groups() -> None:
    random = np.random.default_rng(1)
    rows = [np.concatenate([[group] * 20, random.integers(0, 50, 10)]) for group in range(4 * PARTS) for _ in range(8)]
    shares = partition_trees(rows, 4, token_budget=10_000)
    sizes = [PrefixTree.of([rows[i] for part in share for i in part]).size for share in shares]
    whole = PrefixTree.of(rows).size
    assert sum(sizes) <= 1.1 * whole  # without sharing it would be 2.9 times as much
    assert max(sizes) <= 1.05 * sum(sizes) / 4
