"""Entries of tokens stay with their tokens, however tokens are taken, masked and joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy

Lists = list[list[int]]


def store(entries: Lists) -> StoredProxy:
    """Returns a proxy with these ids for each token; log q is minus the id."""
    ids = np.array([number for token in entries for number in token], dtype=np.int32)
    counts = np.array([len(token) for token in entries], dtype=np.int64)
    return StoredProxy(counts, ids, -ids.astype(np.float32))


def lists(proxy: StoredProxy) -> Lists:
    assert (proxy.log_q == -proxy.ids).all()
    parts = np.split(proxy.ids, np.cumsum(proxy.counts)[:-1]) if len(proxy.counts) else []
    return [part.tolist() for part in parts]


entries = st.lists(st.lists(st.integers(0, 99), max_size=3), min_size=1, max_size=6)


@given(entries=entries, data=st.data())
def test_take_and_where(entries: Lists, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=8))
    assert lists(store(entries).take(np.array(chosen, dtype=np.int64))) == [entries[i] for i in chosen]
    mask = data.draw(st.lists(st.booleans(), min_size=len(entries), max_size=len(entries)))
    kept = [token if keep else [] for token, keep in zip(entries, mask, strict=True)]
    assert lists(store(entries).where(np.array(mask))) == kept


@given(entries=entries, data=st.data())
def test_join_undoes_any_distribution_over_ranks(entries: Lists, data: st.DataObject) -> None:
    """Data-parallel ranks hold different tokens, tensor-parallel ranks different ids of a token's entries."""
    entries = [sorted(token) for token in entries]
    cut = data.draw(st.integers(0, 100))
    rank_of = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(entries), max_size=len(entries))))
    parts = []
    for rank in (0, 1):
        tokens = data.draw(st.permutations(np.flatnonzero(rank_of == rank).tolist()))
        for low, high in ((0, cut), (cut, 100)):
            part = [[number for number in entries[i] if low <= number < high] for i in tokens]
            parts.append((np.array(tokens, dtype=np.int64), store(part)))
    assert lists(StoredProxy.join(len(entries), parts)) == entries


def test_taken_sequences_keep_their_proxy() -> None:
    proxy = store([[1], [2, 3], [], [4], [5]])
    batch = replace(SequenceBatch.of([range(3), range(4), range(2)], [1, 2, 1]), proxy=proxy)
    assert batch.take([2, 0]).proxy is not None
    taken = batch.with_values(x=np.zeros(5)).take([2, 0])
    assert taken.proxy is not None and lists(taken.proxy) == [[5], [1], [2, 3]]
