from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.passes.results import Table
from megatron_rl.batching.partition import partition
from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.types import Response
from tests.unit.batching.sequence_batches import Mask, batch_of, batches_with_rows, masks

shapes = st.lists(masks, max_size=9)


def places(mask: Mask) -> list[int]:
    """Positions of the sampled tokens in their sequence."""
    return [place for place, sampled in enumerate(mask) if sampled]


@given(shapes)
def test_lengths_targets_and_predictors(shape: list[Mask]) -> None:
    batch = batch_of(shape)
    assert len(batch) == len(shape)
    assert batch.lengths.tolist() == [len(mask) for mask in shape]
    assert batch.sampled_lengths.tolist() == [sum(mask) for mask in shape]
    assert batch.num_sampled_tokens == sum(map(sum, shape)) == len(batch.targets)
    pairs = list(zip(batch.sequences, shape, strict=True))
    assert batch.targets.tolist() == [ids[place] for ids, mask in pairs for place in places(mask)]
    assert batch.predictors.tolist() == [place - 1 for _, mask in pairs for place in places(mask)]


@given(shapes)
def test_a_sequence_and_its_mask_are_views(shape: list[Mask]) -> None:
    batch = batch_of(shape)
    assert [batch.mask_of(i).tolist() for i in range(len(batch))] == shape
    joined = [token for ids in batch.sequences for token in ids.tolist()]
    assert joined == batch.token_ids.tolist() and batch.token_ids.dtype == np.int32
    assert all(not len(ids) or np.shares_memory(ids, batch.token_ids) for ids in batch.sequences)


@given(batches_with_rows(shapes))
def test_taken_sequences_keep_their_masks_and_values(case: tuple[SequenceBatch, list[int]]) -> None:
    batch, some = case
    part = batch.take(some)
    assert [ids.tolist() for ids in part.sequences] == [batch.sequence(i).tolist() for i in some]
    assert [part.mask_of(i).tolist() for i in range(len(part))] == [batch.mask_of(i).tolist() for i in some]
    assert part.values["value"].tolist() == (part.targets * 10.0).tolist()
    np.testing.assert_array_equal(batch.values["value"][batch.token_index(some)], part.values["value"])


@given(batches_with_rows(shapes))
def test_a_value_per_sequence_becomes_a_value_per_sampled_token(case: tuple[SequenceBatch, list[int]]) -> None:
    batch, some = case
    sequence_of_token = batch.per_token(np.arange(len(batch)))
    assert sequence_of_token.shape == (batch.num_sampled_tokens,)
    expected = [i for i in some for _ in range(batch.sampled_lengths[i])]
    assert sequence_of_token[batch.token_index(some)].tolist() == expected


@given(batches_with_rows(shapes))
def test_values_of_sequences_are_read_and_written_together(case: tuple[SequenceBatch, list[int]]) -> None:
    batch, some = case
    index, value = batch.token_index(some), batch.values["value"]
    np.testing.assert_array_equal(batch.values_of(some, value), value[index])
    written, expected = np.zeros((2, len(value)))
    batch.set_values(written, some, value[index])
    expected[index] = value[index]
    np.testing.assert_array_equal(written, expected)


@given(shapes)
def test_adding_values_leaves_the_batch_as_it_was(shape: list[Mask]) -> None:
    batch = batch_of(shape)
    more = batch.with_values(other=np.zeros(batch.num_sampled_tokens))
    assert set(more.values) == {"value", "other"} and set(batch.values) == {"value"}
    assert more.take(range(len(batch))).values["value"].tolist() == batch.values["value"].tolist()
    assert set(more.only(("other", "absent")).values) == {"other"} and set(more.values) == {"value", "other"}


@given(shapes)
def test_a_pickled_batch_is_the_same(shape: list[Mask]) -> None:
    batch = batch_of(shape)
    again = pickle.loads(pickle.dumps(batch, 5))
    for name in ("token_ids", "lengths", "sampled_mask", "starts", "sampled_lengths", "predictors", "targets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
    assert again.values["value"].tolist() == batch.values["value"].tolist()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), max_size=9))
def test_single_turn_sequences_are_a_prompt_and_sampled_tokens(lengths: list[tuple[int, int]]) -> None:
    batch = SequenceBatch.of([range(p + r) for p, r in lengths], [p for p, _ in lengths])
    expected = batch_of([[False] * p + [True] * r for p, r in lengths])
    assert batch.lengths.tolist() == expected.lengths.tolist()
    assert batch.sampled_mask.tolist() == expected.sampled_mask.tolist()


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    batch = SequenceBatch.of([[0, 1, 2], [3, 4, 5, 6, 7]], [1, 2])
    with pytest.raises(ValueError, match=r"extra has shape .* the batch has 5 tokens"):
        batch.with_values(extra=np.zeros(shape))


@given(shapes, st.lists(st.booleans(), max_size=4))
def test_a_sampled_first_token_is_refused(shape: list[Mask], rest: Mask) -> None:
    """No position predicts the first token of a sequence, wherever that sequence stands in the batch."""
    shape = [*shape, [True, *rest]]
    with pytest.raises(ValueError, match="first token of a sequence cannot be a sampled one"):
        SequenceBatch.joined([np.arange(len(mask)) for mask in shape], shape)


@pytest.mark.parametrize(("ids", "mask"), [(3, 4), (4, 3), (5, 5)])
def test_arrays_that_do_not_fit_the_lengths_are_refused(ids: int, mask: int) -> None:
    with pytest.raises(ValueError, match=rf"the sequences have 4 tokens, .*\({ids},\).*\({mask},\)"):
        SequenceBatch(np.zeros(ids, np.int32), np.array([1, 3]), np.zeros(mask, bool))


def test_sequences_of_prompts_and_responses() -> None:
    pairs = [
        (tuple(range(i + 1)), Response(tokens, [-0.5 * t for t in tokens], "stop", 0))
        for i, tokens in enumerate([[7, 8], [9]])
    ]
    batch = sequences_of(pairs)
    assert [ids.tolist() for ids in batch.sequences] == [[0, 7, 8], [0, 1, 9]]
    assert [batch.mask_of(i).tolist() for i in range(2)] == [[False, True, True], [False, False, True]]
    assert batch.values["rollout_log_probs"].tolist() == [-3.5, -4.0, -4.5]


def test_tokens_of_a_tool_are_no_sampled_tokens() -> None:
    prompt = (1, 2)
    turns = Response([3, 4, 5, 6], [-1.0, 0.0, 0.0, -2.0], "stop", 0, sampled_mask=[True, False, False, True])
    plain = Response([3, 7], [-1.0, -3.0], "stop", 0)
    batch = sequences_of([(prompt, turns), (prompt, plain)])
    assert [ids.tolist() for ids in batch.sequences] == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7]]
    assert batch.sampled_lengths.tolist() == [2, 2]
    assert batch.targets.tolist() == [3, 6, 3, 7] and batch.predictors.tolist() == [1, 4, 1, 2]
    assert batch.values["rollout_log_probs"].tolist() == [-1.0, -2.0, -1.0, -3.0]


def test_a_response_without_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="a response of 2 tokens has 0 log-probs"):
        sequences_of([((1,), Response([2, 3], [], "stop", 0))])


def test_no_responses_are_an_empty_batch() -> None:
    batch = sequences_of([])
    assert (len(batch), batch.num_sampled_tokens, len(batch.targets)) == (0, 0, 0)


@given(st.lists(masks, min_size=1, max_size=9), st.integers(1, 30), st.integers(1, 4))
def test_the_answers_of_the_ranks_are_put_back_in_the_order_of_the_batch(
    shape: list[Mask], budget: int, ranks: int
) -> None:
    from megatron_rl.cluster.actors import merge_tables

    batch = batch_of(shape)
    tables = []
    for share in partition(batch.lengths.tolist(), ranks, token_budget=budget):
        own = [row for bucket in share for row in bucket]
        part = batch.take(own)
        columns = {"value": part.values["value"], "logits": np.stack([part.targets, -part.targets], 1)} if own else {}
        tables.append(Table(np.array(own, dtype=np.int64), columns))
    merged = merge_tables(batch, tables)[0]
    assert merged["value"].tolist() == batch.values["value"].tolist()
    assert merged["logits"].tolist() == [[token, -token] for token in batch.targets]


def test_all_sequences_in_their_order_are_not_copied() -> None:
    batch = SequenceBatch.of([[1, 2, 3], [4, 5]], [1, 1])
    assert batch.take([0, 1]) is batch
    assert batch.take([1, 0]).token_ids.tolist() == [4, 5, 1, 2, 3]
