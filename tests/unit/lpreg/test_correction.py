"""Importance weights between engine and actor, and the rejection of complete responses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpreg import LossInputs, accepted_sequences, make_loss, masked_weights, truncated_weights

ROLLOUT = torch.full((5,), -1.0, dtype=torch.float64)
RATIO = torch.tensor([0.1, 0.5, 1.0, 2.0, 8.0], dtype=torch.float64)
ACTOR = ROLLOUT + RATIO.log()


def test_truncated_and_masked_weights() -> None:
    torch.testing.assert_close(truncated_weights(ACTOR, ROLLOUT, high=2.5), RATIO.clamp(max=2.5))
    got = masked_weights(ACTOR, ROLLOUT, low=0.4, high=2.5)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0], dtype=torch.float64))
    actor = ACTOR.clone().requires_grad_()
    assert not truncated_weights(actor, ROLLOUT).requires_grad and not masked_weights(actor, ROLLOUT).requires_grad


def test_weights_of_nearly_impossible_tokens_stay_finite() -> None:
    impossible = torch.tensor([-1000.0])
    assert truncated_weights(torch.zeros(1), impossible, high=2.0).item() == 2.0
    assert masked_weights(torch.zeros(1), impossible).item() == 0.0
    assert not accepted_sequences(torch.zeros(1), impossible, torch.zeros(1, dtype=torch.int64)).item()


@pytest.mark.parametrize("name", ["grpo", "clip_higher", "dual_clip", "cispo"])
def test_weighting_advantages_equals_weighting_token_losses(name: str) -> None:
    weights = truncated_weights(ACTOR, ROLLOUT)
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5, 1.0], dtype=torch.float64)
    new = (ACTOR + torch.tensor([0.5, -0.5, 0.1, 0.6, -0.4], dtype=torch.float64)).requires_grad_()

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(log_probs=new, old_log_probs=ACTOR, advantages=advantages, denominator=5)
        return torch.autograd.grad(make_loss(name)(inputs).loss, new)[0]

    torch.testing.assert_close(gradient(advantages * weights), gradient(advantages) * weights)


@given(
    st.lists(st.lists(st.tuples(st.floats(-0.1, 0.1), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=5)
)
def test_responses_are_accepted_by_their_geometric_mean(responses: list[list[tuple[float, bool]]]) -> None:
    flat = [(i, gap, counts) for i, response in enumerate(responses) for gap, counts in response]
    gaps = torch.tensor([token[1] for token in flat], dtype=torch.float64)
    mask = torch.tensor([token[2] for token in flat])
    got = accepted_sequences(
        gaps, torch.zeros_like(gaps), torch.tensor([token[0] for token in flat]), low=0.98, high=1.03, mask=mask
    )
    for (i, _, _), accepted in zip(flat, got.tolist(), strict=True):
        counted = [gap for gap, counts in responses[i] if counts]
        mean = math.exp(sum(counted) / len(counted)) if counted else 1.0
        assert accepted == (0.98 <= mean <= 1.03) or min(abs(mean - 0.98), abs(mean - 1.03)) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_weights(ACTOR, ROLLOUT[:2]), r"rollout_log_probs has shape \[2\], but actor_log_probs has"),
        (lambda: truncated_weights(ACTOR, ROLLOUT, high=0.0), "got low=0.0 and high=0.0"),
        (lambda: masked_weights(ACTOR, ROLLOUT, low=3.0), "0 <= low < high, got low=3.0"),
        (lambda: masked_weights(ACTOR, ROLLOUT * math.nan), "NaN, first at token 0"),
        (lambda: accepted_sequences(ACTOR, ROLLOUT, torch.zeros(3)), r"sequence_ids has shape \[3\]"),
        (lambda: accepted_sequences(ACTOR, ROLLOUT, torch.zeros(5), mask=torch.ones(2, dtype=torch.bool)), "mask has"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
