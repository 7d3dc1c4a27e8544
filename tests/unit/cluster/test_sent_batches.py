"""What the driver sends of a batch to each rank of the actor, without Ray."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.actor.interface import ActorRank
from megatron_rl.batching.replicas import ReplicaBatch, Sharing
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.cluster import actors
from megatron_rl.parallel.layout import Layout
from megatron_rl.training.update import LOSS_VALUES

LAYOUT = Layout(tensor=2, pipeline=3, data=2, context=2)


def whole_batch() -> SequenceBatch:
    """Long sequences with every value that a loss can need, and a stored proxy of three entries per token."""
    random = np.random.default_rng(0)
    rows = SequenceBatch.of([random.integers(0, 50, n) for n in random.integers(500, 3000, 16)], [20] * 16)
    count = rows.num_sampled_tokens
    rows = rows.with_values(**{name: np.zeros(count, dtype=np.float32) for name in LOSS_VALUES})
    proxy = StoredProxy(np.full(count, 3), np.zeros(3 * count, np.int32), np.zeros(3 * count, np.float32))
    return SequenceBatch(rows.token_ids, rows.lengths, rows.sampled_mask, rows.values, proxy)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> tuple[SequenceBatch, list[ReplicaBatch], list[int]]:
    """Returns a batch, the part of it that each rank gets, and how many ranks share each part that is sent."""
    users: list[int] = []

    def shared(part: ReplicaBatch, count: int) -> ReplicaBatch:
        users.append(count)
        return part

    monkeypatch.setattr(actors, "shared", shared)
    some: Any = object.__new__(actors.Actors)
    some._layout = LAYOUT
    some._sharing = Sharing(LAYOUT.data, "packed", token_budget=4000, even_length=1e4)
    some.ranks = [SimpleNamespace(submit=lambda method, part: part)] * LAYOUT.world_size
    batch = whole_batch()
    return batch, some._submit_parts(ActorRank.logits, batch), users


def test_every_rank_gets_the_sequences_of_its_replica(sent: Any) -> None:
    batch, parts, users = sent
    assert [part.replica for part in parts] == [LAYOUT.replica_of(rank) for rank in range(LAYOUT.world_size)]
    for part in parts:
        np.testing.assert_array_equal(part.sequences.token_ids, batch.take(part.rows).token_ids)
    assert sum(users) == LAYOUT.world_size


def test_only_the_last_stage_gets_values(sent: Any) -> None:
    _, parts, _ = sent
    for rank, part in enumerate(parts):
        last = LAYOUT.stage_of(rank) == LAYOUT.pipeline - 1
        assert set(part.sequences.values) == (set(LOSS_VALUES) if last else set())
        assert (part.sequences.proxy is not None) is last


def test_a_stage_before_the_last_gets_five_bytes_a_token(sent: Any) -> None:
    """A token takes four bytes, its mask one, and a sequence at most a kilobyte besides. The last stage gets more than
    ten times as much."""
    _, parts, _ = sent
    for replica in range(LAYOUT.data):
        first, last = (next(p for p in half if p.replica == replica) for half in (parts, reversed(parts)))
        tokens, size = len(first.sequences.token_ids), len(pickle.dumps(first))
        assert 5 * tokens < size < 5 * tokens + 1024 * len(first.rows)
        assert len(pickle.dumps(last)) > 10 * size
