from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.passes.micro_batch import MicroBatch, micro_batch
from megatron_rl.batching.context import chunk_multiple, held_by
from megatron_rl.batching.packing import PackingForm, PackingSpec, packed_length
from megatron_rl.batching.sequences import SequenceBatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def batches(draw: st.DrawFn) -> tuple[SequenceBatch, list[int]]:
    """Rows of random tokens, many or few different ones, and some of their indices, perhaps none."""
    shape = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    most = draw(st.sampled_from([2, 50]))
    rows = SequenceBatch([random.integers(1, most + 1, p + r) for p, r in shape], np.array([p for p, _ in shape]))
    rows = rows.with_values(
        advantages=random.normal(size=rows.num_sampled_tokens).astype(np.float32),
        selected=random.random(rows.num_sampled_tokens) < 0.5,
    )
    chosen = draw(st.permutations(range(len(shape))))
    return rows, chosen[: draw(st.integers(0, len(chosen)))]


FORMS: tuple[PackingForm, ...] = ("prefix_tree", "packed", "padded")
multiples = st.integers(1, 8)
forms = st.builds(PackingSpec, rows=st.sampled_from(FORMS), length_multiple=multiples)
single_row_forms = st.builds(PackingSpec, rows=st.sampled_from(FORMS[:2]), length_multiple=multiples)


def flat(values: torch.Tensor) -> torch.Tensor:
    """[b, s] -> [s * b], the order of hidden states."""
    return values.T.flatten()


def expected(rows: SequenceBatch, chosen: list[int]) -> list[tuple[int, int, int, int]]:
    """(token before, its position, target, row) of every response token."""
    return [
        (int(rows.tokens[i][at - 1]), at - 1, int(rows.tokens[i][at]), i) for i in chosen for at in responses(rows, i)
    ]


def responses(rows: SequenceBatch, i: int) -> range:
    """Where the response tokens of a row are in it."""
    return range(int(rows.prompt_lengths[i]), len(rows.tokens[i]))


def found(batch: MicroBatch) -> list[tuple[int, ...]]:
    tokens, positions = (flat(values)[batch.predictors].tolist() for values in (batch.tokens, batch.positions))
    return list(zip(tokens, positions, batch.targets.tolist(), batch.sequence_ids.tolist(), strict=True))


@given(batches(), forms)
def test_predictors_are_where_the_targets_are_predicted(
    case: tuple[SequenceBatch, list[int]], form: PackingSpec
) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU, form)
    assert batch.rows == tuple(chosen) and batch.places is None
    assert found(batch) == expected(rows, chosen)
    assert batch.tokens.shape == batch.positions.shape
    assert batch.tokens.shape[1] % form.length_multiple == 0


@given(batches(), st.integers(1, 8))
def test_padded_rows_are_padded_on_the_right(case: tuple[SequenceBatch, list[int]], multiple: int) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU, PackingSpec(rows="padded", length_multiple=multiple))
    assert batch.packing is None
    for place, i in enumerate(chosen):
        inputs = rows.tokens[i][:-1]
        assert batch.tokens[place, : len(inputs)].tolist() == inputs.tolist()
        assert not batch.tokens[place, len(inputs) :].any()
        assert batch.positions[place].tolist() == list(range(batch.tokens.shape[1]))


@given(batches(), st.integers(1, 8))
def test_packed_rows_follow_each_other_and_all_padding_comes_last(
    case: tuple[SequenceBatch, list[int]], multiple: int
) -> None:
    rows, chosen = case
    form = PackingSpec(length_multiple=multiple)
    batch = micro_batch(rows, chosen, CPU, form)
    assert batch.packing is not None
    bounds = batch.packing.cu_seqlens_q.tolist()
    inputs = [rows.tokens[i][:-1].tolist() for i in chosen]
    padding = batch.tokens.shape[1] - sum(map(len, inputs))
    assert padding < multiple or not chosen
    assert batch.tokens.shape[1] == packed_length(rows, chosen, form)
    parts = [batch.tokens[0, start:stop].tolist() for start, stop in pairwise(bounds)]
    assert parts == [*inputs, *([[0] * padding] if padding else [])]
    positions = [batch.positions[0, start:stop].tolist() for start, stop in pairwise(bounds)]
    assert positions == [list(range(len(part))) for part in parts]
    assert batch.packing.max_seqlen_q == max(map(len, parts))


@given(batches(), multiples)
def test_what_rows_share_is_there_once(case: tuple[SequenceBatch, list[int]], multiple: int) -> None:
    rows, chosen = case
    form = PackingSpec(rows="prefix_tree", length_multiple=multiple)
    batch = micro_batch(rows, chosen, CPU, form)
    prefixes = {tuple(rows.tokens[i][: end + 1]) for i in chosen for end in range(len(rows.tokens[i]) - 1)}
    assert batch.tokens.shape == (1, max(1, -(-len(prefixes) // multiple)) * multiple)
    assert batch.tokens.shape[1] == packed_length(rows, chosen, form)
    before_responses = {tuple(rows.tokens[i][:at]) for i in chosen for at in responses(rows, i)}
    assert len(set(batch.predictors.tolist())) == len(before_responses)


@given(batches(), single_row_forms, st.integers(0, 90))
def test_a_given_length_is_filled_with_padding(
    case: tuple[SequenceBatch, list[int]], form: PackingSpec, extra: int
) -> None:
    rows, chosen = case
    length = packed_length(rows, chosen, form) + extra * form.length_multiple
    batch = micro_batch(rows, chosen, CPU, form, length)
    assert batch.tokens.shape == (1, length)
    assert found(batch) == expected(rows, chosen)


@given(batches(), st.integers(2, 4), st.integers(1, 3))
def test_context_ranks_together_predict_every_token_once(
    case: tuple[SequenceBatch, list[int]], ranks: int, multiple: int
) -> None:
    rows, chosen = case
    whole = {}
    for rank in range(ranks):
        form = PackingSpec(length_multiple=ranks * multiple, context_ranks=ranks, context_rank=rank)
        batch = micro_batch(rows, chosen, CPU, form)
        assert batch.packing is not None and batch.places is not None
        bounds = batch.packing.cu_seqlens_q.diff().tolist()
        assert all(length % chunk_multiple(ranks) == 0 for length in bounds)
        # This rank's tokens are those it holds of the rows as they would be on one rank.
        held = held_by(rank, ranks, bounds)
        assert batch.tokens.shape == (1, len(held))
        assert (len(held) * ranks) % (ranks * multiple) == 0
        assert len(batch.targets) == sum(rows.sampled_lengths[i] for i in chosen)  # all of them, on every rank
        tokens, positions = flat(batch.tokens)[batch.predictors], flat(batch.positions)[batch.predictors]
        for place, token, position in zip(batch.places.tolist(), tokens.tolist(), positions.tolist(), strict=True):
            assert place not in whole
            whole[place] = (token, position, int(batch.targets[place]), int(batch.sequence_ids[place]))
    assert [whole[place] for place in sorted(whole)] == expected(rows, chosen)


@given(batches(), forms)
def test_values_keep_their_dtype_and_their_token(case: tuple[SequenceBatch, list[int]], form: PackingSpec) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU, form)
    assert batch.values["advantages"].dtype == torch.float32 and batch.values["selected"].dtype == torch.bool
    for name, value in batch.values.items():
        np.testing.assert_array_equal(value.numpy(), rows.values[name][rows.token_index(chosen)])
