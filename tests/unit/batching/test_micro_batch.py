from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.micro_batch import micro_batch
from megatron_rl.batching.rows import Rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Rows, list[int]]:
    """Rows of random tokens, and at least one of their indices."""
    shape = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = Rows([random.integers(1, 50, p + r) for p, r in shape], np.array([p for p, _ in shape]))
    rows = rows.with_values(
        advantages=random.normal(size=rows.num_response_tokens).astype(np.float32),
        selected=random.random(rows.num_response_tokens) < 0.5,
    )
    chosen = draw(st.permutations(range(len(shape))))
    return rows, chosen[: draw(st.integers(1, len(chosen)))]


@given(batches())
def test_predictors_are_where_the_targets_are_predicted(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU)
    width = batch.tokens.shape[1]
    assert width == max(len(rows.tokens[i]) for i in chosen) - 1
    token = 0
    for place, i in enumerate(chosen):
        row, prompt = rows.tokens[i], int(rows.prompt_lengths[i])
        for position in range(prompt, len(row)):
            predictor = int(batch.predictors[token])
            assert divmod(predictor, width) == (place, position - 1)
            assert batch.tokens.flatten()[predictor] == row[position - 1]
            assert batch.targets[token] == row[position]
            assert batch.sequence_ids[token] == i
            token += 1
    assert token == len(batch.predictors) == len(batch.targets)


@given(batches())
def test_rows_are_padded_on_the_right(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU)
    assert batch.rows == tuple(chosen)
    for place, i in enumerate(chosen):
        inputs = rows.tokens[i][:-1]
        assert batch.tokens[place, : len(inputs)].tolist() == inputs.tolist()
        assert not batch.tokens[place, len(inputs) :].any()
        assert batch.positions[place].tolist() == list(range(batch.tokens.shape[1]))


@given(batches())
def test_values_keep_their_dtype_and_their_token(case: tuple[Rows, list[int]]) -> None:
    rows, chosen = case
    batch = micro_batch(rows, chosen, CPU)
    assert batch.values["advantages"].dtype == torch.float32 and batch.values["selected"].dtype == torch.bool
    for name, value in batch.values.items():
        np.testing.assert_array_equal(value.numpy(), rows.values[name][rows.token_index(chosen)])
