"""A micro-batch holds the same tokens, positions and targets in every packing form, whatever the mask."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.passes.micro_batch import MicroBatch, micro_batch
from megatron_rl.batching.context import chunk_multiple, held_by
from megatron_rl.batching.packing import PackingForm, PackingSpec, pack, packed_length
from megatron_rl.batching.sequences import SequenceBatch
from tests.unit.batching.sequence_batches import masks

CPU = torch.device("cpu")


Case = tuple[SequenceBatch, list[int]]


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Sequences of random tokens, many or few different ones, and the indices of some of them, perhaps none."""
    shape = draw(st.lists(masks, min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = draw(st.sampled_from([2, 50]))
    batch = SequenceBatch.joined([random.integers(1, most + 1, len(mask)) for mask in shape], shape)
    batch = batch.with_values(
        advantages=random.normal(size=batch.num_sampled_tokens).astype(np.float32),
        selected=random.random(batch.num_sampled_tokens) < 0.5,
    )
    chosen = draw(st.permutations(range(len(shape))))
    return batch, chosen[: draw(st.integers(0, len(chosen)))]


FORMS: tuple[PackingForm, ...] = ("prefix_tree", "packed", "padded")
multiples = st.integers(1, 8)
forms = st.builds(PackingSpec, rows=st.sampled_from(FORMS), length_multiple=multiples)
single_row_forms = st.builds(PackingSpec, rows=st.sampled_from(FORMS[:2]), length_multiple=multiples)


def flat(values: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [s * b], the order of hidden states."""
    return values.T.flatten()


def expected(whole: SequenceBatch, chosen: list[int]) -> list[tuple[int, int, int, int]]:
    """(token before, its position, target, sequence) of every sampled token."""
    return [
        (int(whole.sequence(i)[at - 1]), at - 1, int(whole.sequence(i)[at]), i)
        for i in chosen
        for at in sampled(whole, i)
    ]


def sampled(whole: SequenceBatch, i: int) -> list[int]:
    """Positions of the sampled tokens of a sequence."""
    return np.flatnonzero(whole.mask_of(i)).tolist()


def found(batch: MicroBatch) -> list[tuple[int, ...]]:
    tokens, positions = (flat(values)[batch.predictors].tolist() for values in (batch.tokens, batch.positions))
    return list(zip(tokens, positions, batch.targets.tolist(), batch.sequence_ids.tolist(), strict=True))


@given(batches(), forms)
def test_predictors_hold_the_token_before_each_sampled_token_and_its_position(case: Case, form: PackingSpec) -> None:
    whole, chosen = case
    batch = micro_batch(whole, chosen, CPU, form)
    assert batch.rows == tuple(chosen) and batch.places is None
    assert found(batch) == expected(whole, chosen)
    assert batch.tokens.shape == batch.positions.shape
    assert batch.tokens.shape[1] % form.length_multiple == 0


@given(batches(), st.integers(1, 8))
def test_padded_sequences_are_padded_on_the_right(case: Case, multiple: int) -> None:
    whole, chosen = case
    batch = micro_batch(whole, chosen, CPU, PackingSpec(rows="padded", length_multiple=multiple))
    assert batch.packing is None
    for place, i in enumerate(chosen):
        inputs = whole.sequence(i)[:-1]
        assert batch.tokens[place, : len(inputs)].tolist() == inputs.tolist()
        assert not batch.tokens[place, len(inputs) :].any()
        assert batch.positions[place].tolist() == list(range(batch.tokens.shape[1]))


@given(batches(), st.integers(1, 8))
def test_packed_sequences_follow_each_other_and_all_padding_comes_last(case: Case, multiple: int) -> None:
    whole, chosen = case
    form = PackingSpec(length_multiple=multiple)
    batch = micro_batch(whole, chosen, CPU, form)
    assert batch.packing is not None
    bounds = batch.packing.cu_seqlens_q.tolist()
    inputs = [whole.sequence(i)[:-1].tolist() for i in chosen]
    padding = batch.tokens.shape[1] - sum(map(len, inputs))
    assert padding < multiple or not any(inputs)  # at least one position
    assert batch.tokens.shape[1] == packed_length(whole, chosen, form)
    parts = [batch.tokens[0, start:stop].tolist() for start, stop in pairwise(bounds)]
    assert parts == [*inputs, *([[0] * padding] if padding else [])]
    positions = [batch.positions[0, start:stop].tolist() for start, stop in pairwise(bounds)]
    assert positions == [list(range(len(part))) for part in parts]
    assert batch.packing.max_seqlen_q == max(map(len, parts))


@given(batches(), multiples)
def test_a_shared_prefix_appears_once(case: Case, multiple: int) -> None:
    whole, chosen = case
    form = PackingSpec(rows="prefix_tree", length_multiple=multiple)
    batch = micro_batch(whole, chosen, CPU, form)
    prefixes = {tuple(whole.sequence(i)[: end + 1]) for i in chosen for end in range(len(whole.sequence(i)) - 1)}
    assert batch.tokens.shape == (1, max(1, -(-len(prefixes) // multiple)) * multiple)
    assert batch.tokens.shape[1] == packed_length(whole, chosen, form)
    contexts = {tuple(whole.sequence(i)[:at]) for i in chosen for at in sampled(whole, i)}
    assert len(set(batch.predictors.tolist())) == len(contexts)


@given(batches(), single_row_forms, st.integers(0, 90))
def test_a_given_length_is_filled_with_padding(case: Case, form: PackingSpec, extra: int) -> None:
    whole, chosen = case
    length = packed_length(whole, chosen, form) + extra * form.length_multiple
    batch = micro_batch(whole, chosen, CPU, form, length)
    assert batch.tokens.shape == (1, length)
    assert found(batch) == expected(whole, chosen)


@given(batches(), st.integers(2, 4), st.integers(1, 3))
def test_context_ranks_together_predict_every_token_once(case: Case, ranks: int, multiple: int) -> None:
    whole, chosen = case
    found_by_place = {}
    for rank in range(ranks):
        form = PackingSpec(length_multiple=ranks * multiple, context_ranks=ranks, context_rank=rank)
        batch = micro_batch(whole, chosen, CPU, form)
        assert batch.packing is not None and batch.places is not None
        bounds = batch.packing.cu_seqlens_q.diff().tolist()
        assert all(length % chunk_multiple(ranks) == 0 for length in bounds)
        # This rank's tokens are its part of the sequences as one rank would hold them.
        held = held_by(rank, ranks, bounds)
        assert batch.tokens.shape == (1, len(held))
        assert (len(held) * ranks) % (ranks * multiple) == 0
        assert len(batch.targets) == sum(whole.sampled_lengths[i] for i in chosen)  # all of them, on every rank
        tokens, positions = flat(batch.tokens)[batch.predictors], flat(batch.positions)[batch.predictors]
        for place, token, position in zip(batch.places.tolist(), tokens.tolist(), positions.tolist(), strict=True):
            assert place not in found_by_place
            found_by_place[place] = (token, position, int(batch.targets[place]), int(batch.sequence_ids[place]))
    assert [found_by_place[place] for place in sorted(found_by_place)] == expected(whole, chosen)


@given(batches(), forms)
def test_values_keep_their_dtype_and_their_token(case: Case, form: PackingSpec) -> None:
    whole, chosen = case
    batch = micro_batch(whole, chosen, CPU, form)
    assert batch.values["advantages"].dtype == torch.float32 and batch.values["selected"].dtype == torch.bool
    for name, value in batch.values.items():
        np.testing.assert_array_equal(value.numpy(), whole.values[name][whole.token_index(chosen)])


def tool_batch() -> SequenceBatch:
    """Three sequences of one prompt, two of which also share their first turn and the tool's answer."""
    turns = [False] * 3 + [True] * 4 + [False] * 5 + [True] * 3
    first = np.arange(1, len(turns) + 1)
    other_end, other_turn = first.copy(), first.copy()
    other_end[-2:] += 50
    other_turn[4:] += 100
    return SequenceBatch.joined([first, other_end, other_turn, first[:1]], [turns, turns, turns, turns[:1]])


def test_tokens_of_a_tool_are_inputs_and_no_targets_in_every_form() -> None:
    whole = tool_batch()
    chosen = [2, 0, 3, 1]
    wanted = expected(whole, chosen)
    assert len(wanted) == 3 * 7
    for rows in FORMS:
        batch = micro_batch(whole, chosen, CPU, PackingSpec(rows=rows))
        assert found(batch) == wanted, rows
        packed = pack(whole.take(chosen), PackingSpec(rows=rows))
        inputs = {token for i in chosen for token in whole.sequence(i)[:-1].tolist()}
        assert inputs <= set(packed.tokens.flatten().tolist()), "the model also reads the tool's tokens"


def test_every_form_of_one_token_sequences_has_a_position() -> None:
    whole = SequenceBatch.joined([np.array([4]), np.array([5])], [[False], [False]])
    for rows in FORMS:
        batch = micro_batch(whole, [0, 1], CPU, PackingSpec(rows=rows))
        assert batch.tokens.shape[1] == 1 and not batch.tokens.any(), rows


def test_forms_without_sampled_tokens_have_no_predictors() -> None:
    whole = SequenceBatch.joined([np.arange(1, 4), np.arange(1, 3)], [[False] * 3, [False] * 2])
    for rows in FORMS:
        batch = micro_batch(whole, [0, 1], CPU, PackingSpec(rows=rows))
        assert len(batch.predictors) == len(batch.targets) == len(batch.sequence_ids) == 0
        assert batch.tokens.numel() > 0
