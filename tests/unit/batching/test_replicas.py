"""Every replica gets its own sequences only, in the micro-batches of the whole partition."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from megatron_rl.batching.packing import PackingForm
from megatron_rl.batching.partition import partition
from megatron_rl.batching.replicas import Sharing
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.parallel.layout import Layout


def batch() -> SequenceBatch:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 40, 30)
    rows = SequenceBatch.of([random.integers(0, 50, n) for n in lengths], [2] * len(lengths))
    return rows.with_values(advantages=np.arange(rows.num_sampled_tokens, dtype=np.float32))


def sharing(rows: PackingForm, replicas: int) -> Sharing:
    return Sharing(replicas, rows, token_budget=64, even_length=100.0, count_multiple=2, same_count=True)


@pytest.mark.parametrize("rows", ["packed", "padded", "prefix_tree"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_parts_are_the_whole_batch_once(rows: PackingForm, replicas: int) -> None:
    whole, how = batch(), sharing(rows, replicas)
    parts = list(how.divide(whole))
    assert [part.replica for part in parts] == list(range(replicas))
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(len(whole)))
    for part in parts:
        assert sorted(row for rows in part.micro_batches for row in rows) == list(range(len(part.rows)))
        for local, row in enumerate(part.rows):
            np.testing.assert_array_equal(part.sequences.sequence(local), whole.sequence(row))
        np.testing.assert_array_equal(
            part.sequences.values["advantages"], whole.values["advantages"][whole.token_index(part.rows)]
        )
        again = how.part_of(whole, part.replica)
        assert again.micro_batches == part.micro_batches and again.rows.tolist() == part.rows.tolist()


def test_the_micro_batches_are_those_of_the_partition() -> None:
    whole = batch()
    costs = whole.lengths * (1 + whole.lengths / 100.0)
    expected = partition(whole.lengths.tolist(), 3, token_budget=64, costs=costs, count_multiple=2, same_count=True)
    found = [[part.rows[rows].tolist() for rows in part.micro_batches] for part in sharing("packed", 3).divide(whole)]
    assert found == expected


def test_a_part_travels_without_the_rest() -> None:
    whole = batch()
    sizes = [len(pickle.dumps(part)) for part in sharing("packed", 3).divide(whole)]
    assert sum(sizes) < 1.3 * len(pickle.dumps(whole))


def test_ranks_belong_to_replicas_and_stages_as_megatron_numbers_them() -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(tensor=2, context=2, data=3, pipeline=2)
    ranks = RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    for group in ranks.get_ranks("dp"):
        assert [layout.replica_of(rank) for rank in group] == [0, 1, 2]
    for group in ranks.get_ranks("pp"):
        assert [layout.stage_of(rank) for rank in group] == [0, 1]
