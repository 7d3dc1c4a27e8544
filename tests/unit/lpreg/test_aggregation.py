"""The three means against loops over sequences, and as sums over parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpreg.aggregation import constant_length_mean, mean_of_sequence, sequence_mean_token_mean, token_mean

responses = st.lists(
    st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=6
)


@given(responses, st.randoms(use_true_random=False))
def test_means_equal_loops_over_sequences_in_any_token_order(
    batch: list[list[tuple[float, bool]]], random: object
) -> None:
    tokens = [(7 * i - 3, value, counted) for i, response in enumerate(batch) for value, counted in response]
    random.shuffle(tokens)  # type: ignore[attr-defined]
    ids = torch.tensor([token[0] for token in tokens])
    losses = torch.tensor([token[1] for token in tokens], dtype=torch.float64)
    mask = torch.tensor([token[2] for token in tokens])
    kept = [[value for value, counted in response if counted] for response in batch]

    total = sum(sum(response) for response in kept)
    assert float(token_mean(losses, mask, 10)) == pytest.approx(total / 10)
    assert float(constant_length_mean(losses, mask, 8, 4)) == pytest.approx(total / 32)
    means = [sum(response) / len(response) if response else 0.0 for response in kept]
    assert float(sequence_mean_token_mean(losses, mask, ids, 4)) == pytest.approx(sum(means) / 4)
    want = [means[(token[0] + 3) // 7] for token in tokens]
    assert mean_of_sequence(losses, mask, ids).tolist() == pytest.approx(want)


def test_masked_values_may_be_anything() -> None:
    losses = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    mask, ids = torch.tensor([True, False, False]), torch.tensor([0, 0, 1])
    for mean in (
        token_mean(losses, mask, 2),
        sequence_mean_token_mean(losses, mask, ids, 2),
        constant_length_mean(losses, mask, 1, 2),
    ):
        assert mean.item() == 0.5
        assert torch.autograd.grad(mean, losses)[0].tolist() == [0.5, 0.0, 0.0]


def test_the_mean_of_no_tokens_is_zero() -> None:
    nothing, mask = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert float(sequence_mean_token_mean(nothing, mask, torch.zeros(0, dtype=torch.int64), 3)) == 0
