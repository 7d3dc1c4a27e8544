from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.buckets import length_buckets, share_out

lengths_lists = st.lists(st.integers(1, 50), max_size=40)
budgets = st.integers(1, 200)


def padded_tokens(bucket: list[int], lengths: list[int]) -> int:
    return len(bucket) * max(lengths[row] for row in bucket)


@given(lengths_lists, budgets)
def test_buckets_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    buckets = length_buckets(lengths, budget)
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    assert all(len(bucket) == 1 or padded_tokens(bucket, lengths) <= budget for bucket in buckets)


@given(lengths_lists, budgets)
def test_the_longest_rows_come_first(lengths: list[int], budget: int) -> None:
    order = [lengths[row] for bucket in length_buckets(lengths, budget) for row in bucket]
    assert order == sorted(lengths, reverse=True)


@given(lengths_lists, budgets)
def test_a_bucket_is_closed_only_when_it_is_full(lengths: list[int], budget: int) -> None:
    buckets = length_buckets(lengths, budget)
    for bucket in buckets[:-1]:
        assert (len(bucket) + 1) * lengths[bucket[0]] > budget


@given(lengths_lists, budgets, st.integers(1, 6))
def test_shares_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    shares = share_out(lengths, budget, ranks)
    assert len(shares) == ranks
    buckets = [bucket for share in shares for bucket in share]
    assert sorted(row for bucket in buckets for row in bucket) == list(range(len(lengths)))
    assert all(len(bucket) == 1 or padded_tokens(bucket, lengths) <= budget for bucket in buckets)


@given(lengths_lists, budgets, st.integers(1, 6))
def test_no_rank_has_more_than_one_bucket_too_many(lengths: list[int], budget: int, ranks: int) -> None:
    shares = share_out(lengths, budget, ranks)
    loads = [sum(lengths[row] for bucket in share for row in bucket) for share in shares]
    largest = max((sum(lengths[row] for row in bucket) for share in shares for bucket in share), default=0)
    assert max(loads) - min(loads) <= largest


def test_a_batch_that_fits_into_one_bucket_is_shared_all_the_same() -> None:
    shares = share_out([10] * 8, token_budget=1000, ranks=4)
    assert [sum(len(bucket) for bucket in share) for share in shares] == [2, 2, 2, 2]
