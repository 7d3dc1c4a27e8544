from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.actor.passes.results import Table
from megatron_rl.batching.partition import partition
from megatron_rl.batching.sequences import SequenceBatch, rows_of
from megatron_rl.types import Generation, Prompt, Sample

Shape = list[tuple[int, int]]
"""(prompt length, response length) of each row."""
shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=9)


def ragged(shape: Shape) -> SequenceBatch:
    """No token occurs twice, so that a misplaced one is seen; `value` is each response token's own id."""
    ends = np.cumsum([p + r for p, r in shape], dtype=np.int64)
    rows = SequenceBatch(
        tokens=[np.arange(end - p - r, end) for end, (p, r) in zip(ends, shape, strict=True)],
        prompt_lengths=np.array([p for p, _ in shape], dtype=np.int64),
    )
    return rows.with_values(value=rows.targets * 10.0)


@st.composite
def rows_and_some(draw: st.DrawFn) -> tuple[SequenceBatch, list[int]]:
    """Rows, and some of their indices in any order."""
    shape = draw(shapes)
    order = draw(st.permutations(range(len(shape))))
    return ragged(shape), order[: draw(st.integers(0, len(order)))]


@given(shapes)
def test_lengths_and_targets(shape: Shape) -> None:
    rows = ragged(shape)
    assert rows.lengths.tolist() == [p + r for p, r in shape]
    assert rows.sampled_lengths.tolist() == [r for _, r in shape]
    assert rows.num_sampled_tokens == sum(r for _, r in shape) == len(rows.targets)
    assert rows.targets.tolist() == [token for row, (p, _) in zip(rows.tokens, shape, strict=True) for token in row[p:]]


@given(rows_and_some())
def test_taken_rows_bring_their_own_values(case: tuple[SequenceBatch, list[int]]) -> None:
    rows, some = case
    part = rows.take(some)
    assert [row.tolist() for row in part.tokens] == [rows.tokens[i].tolist() for i in some]
    assert part.prompt_lengths.tolist() == rows.prompt_lengths[np.array(some, dtype=int)].tolist()
    assert part.values["value"].tolist() == (part.targets * 10.0).tolist()
    np.testing.assert_array_equal(rows.values["value"][rows.token_index(some)], part.values["value"])


@given(rows_and_some())
def test_a_value_a_row_becomes_a_value_a_token(case: tuple[SequenceBatch, list[int]]) -> None:
    rows, some = case
    row_of = rows.per_token(np.arange(len(rows)))
    assert row_of.shape == (rows.num_sampled_tokens,)
    assert row_of[rows.token_index(some)].tolist() == [i for i in some for _ in range(rows.sampled_lengths[i])]


@given(shapes)
def test_taking_keeps_the_rows_as_they_were(shape: Shape) -> None:
    rows = ragged(shape)
    more = rows.with_values(other=np.zeros(rows.num_sampled_tokens))
    assert set(more.values) == {"value", "other"} and set(rows.values) == {"value"}
    assert more.take(range(len(rows))).values["value"].tolist() == rows.values["value"].tolist()


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"extra has shape .* the rows have 5 tokens"):
        ragged([(1, 2), (2, 3)]).with_values(extra=np.zeros(shape))


def test_rows_of_samples() -> None:
    samples = [
        Sample(
            prompt=Prompt(id=f"p:{i}", token_ids=tuple(range(i + 1)), text="", label=None),
            group=i,
            generation=Generation(response, [-0.5 * t for t in response], "stop", 0),
            text="",
        )
        for i, response in enumerate([[7, 8], [9]])
    ]
    rows = rows_of(samples)
    assert [row.tolist() for row in rows.tokens] == [[0, 7, 8], [0, 1, 9]]
    assert rows.prompt_lengths.tolist() == [1, 2]
    assert rows.values["rollout_log_probs"].tolist() == [-3.5, -4.0, -4.5]


def test_no_samples_are_no_rows() -> None:
    rows = rows_of([])
    assert (len(rows), rows.num_sampled_tokens, len(rows.targets)) == (0, 0, 0)


@given(shapes.filter(bool), st.integers(1, 30), st.integers(1, 4))
def test_what_the_ranks_answer_is_put_back_in_the_order_of_the_batch(shape: Shape, budget: int, ranks: int) -> None:
    from megatron_rl.cluster.actors import merge_tables

    rows = ragged(shape)
    tables = []
    for share in partition(rows.lengths.tolist(), ranks, token_budget=budget):
        own = [row for bucket in share for row in bucket]
        part = rows.take(own)
        columns = {"value": part.values["value"], "logits": np.stack([part.targets, -part.targets], 1)} if own else {}
        tables.append(Table(np.array(own, dtype=np.int64), columns))
    merged = merge_tables(rows, tables)[0]
    assert merged["value"].tolist() == rows.values["value"].tolist()
    assert merged["logits"].tolist() == [[token, -token] for token in rows.targets]
