"""The correction for the gap between engine and actor, around any method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, accepted_sequences, make_loss, token_stats, with_correction, with_reference_kl
from lpreg.losses.registry import METHODS

TOKENS = 6
GAP = torch.tensor([0.0, 1.0, -1.0, 0.1, -0.1, 0.5], dtype=torch.float64)
"""Log-prob of the actor minus that of the engine."""


def batch(off_policy: bool = False) -> tuple[LossInputs, Tensor]:
    """Inputs that every method accepts, and the logits."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(TOKENS, 5, generator=generator, dtype=torch.float64).requires_grad_()
    stats = token_stats(leaf, torch.arange(TOKENS) % 5, entropy="grad", filter_entropy=True)
    actor = stats.log_probs.detach() - (0.3 if off_policy else 0.0)
    inputs = LossInputs(
        log_probs=stats.log_probs,
        old_log_probs=actor if off_policy else None,
        rollout_log_probs=actor - GAP,
        reference_log_probs=actor,
        advantages=torch.linspace(-1, 1, TOKENS, dtype=torch.float64),
        entropy=stats.entropy,
        filter_entropy=stats.filter_entropy,
        filter_extent=stats.filter_extent,
        log_z=stats.log_z,
        in_filter=stats.in_filter,
        old_log_z=stats.log_z.detach(),
        old_in_filter=stats.in_filter,
        sequence_ids=torch.tensor([7, 7, 7, 9, 9, 4]),
        selection=torch.arange(TOKENS) % 2 == 0,
        denominator=10,
    )
    return inputs, leaf


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("settings", "weights", "bounded"),
    [
        ({"weights": "truncated"}, GAP.exp().clamp(max=2.0), 1),
        ({"weights": "truncated", "high": 1.05}, GAP.exp().clamp(max=1.05), 3),
        ({"weights": "masked"}, torch.where(GAP.abs() < 0.6, GAP.exp(), 0.0), 2),
        ({"weights": "masked", "low": 0.3, "high": 3.0}, GAP.exp(), 0),
    ],
)
def test_weights_multiply_the_advantages(
    name: str, off_policy: bool, settings: dict[str, Any], weights: Tensor, bounded: int
) -> None:
    inputs, leaf = batch(off_policy)
    plain = make_loss(name)
    output = with_correction(plain, **settings)(inputs)
    want = plain(replace(inputs, advantages=inputs.advantages * weights))
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss.loss, leaf, retain_graph=True)[0] for loss in (output, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert output.metrics["correction_weight"].value == pytest.approx(float(weights.mean()))
    assert output.metrics["correction_bounded_fraction"].value == bounded / TOKENS
    assert output.metrics.keys() - want.metrics.keys() == {"correction_weight", "correction_bounded_fraction"}


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_rejected_responses_do_not_count(name: str, off_policy: bool) -> None:
    """The gaps cancel in the first two responses; the third is left out, of a reference penalty too."""
    inputs, _ = batch(off_policy)
    plain = with_reference_kl(make_loss(name), coefficient=0.1)
    output = with_correction(plain, reject_sequences=True)(inputs)
    accepted = torch.arange(TOKENS) < 5
    want = plain(replace(inputs, mask=accepted))
    torch.testing.assert_close(output.loss, want.loss, rtol=1e-12, atol=1e-14)
    assert output.metrics["correction_rejected_fraction"].value == pytest.approx(1 / TOKENS)
    assert with_correction(plain, reject_sequences=True, sequence_high=2.0)(inputs).loss == plain(inputs).loss


def test_masked_tokens_do_not_affect_rejection() -> None:
    inputs, _ = batch()
    assert inputs.rollout_log_probs is not None and inputs.sequence_ids is not None
    masked = replace(inputs, mask=torch.arange(TOKENS) != 1)
    found = with_correction(make_loss("grpo"), reject_sequences=True)(masked).metrics["correction_rejected_fraction"]
    accepted = accepted_sequences(inputs.log_probs, inputs.rollout_log_probs, inputs.sequence_ids, mask=masked.counted)
    assert found.value == pytest.approx(float((~accepted)[masked.counted].double().mean())) == 3 / 5


@pytest.mark.parametrize("name", METHODS)
def test_a_driver_sees_the_needs_of_the_wrapped_method(name: str) -> None:
    plain = make_loss(name)
    loss = with_correction(plain, weights="truncated")
    for what in ("selection", "denominator_counts", "proxy_source", "needs_proxy_kl", "token_separable"):
        assert getattr(loss, what) == getattr(plain, what)
    assert loss.acts_without_advantage == plain.acts_without_advantage
    assert not with_correction(plain, reject_sequences=True).token_separable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "masked", "low": 3.0}, r"high must lie in \(3, inf\), got 2"),
        ({"weights": "clipped"}, "weights must be one of none, truncated, masked"),
        ({"reject_sequences": True, "sequence_low": 2.0}, r"sequence_high must lie in \(2, inf\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_correction(make_loss("grpo"), **settings)
    with pytest.raises(ValueError, match=r"correction needs LossInputs\.rollout_log_probs"):
        with_correction(make_loss("grpo"), weights="truncated")(replace(batch()[0], rollout_log_probs=None))
