"""The penalty for leaving a reference policy: identities of its estimators, and its combination with every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, make_loss, reference_kl, token_stats, with_reference_kl
from lpreg.losses.registry import METHODS

VOCAB, TOKENS = 7, 12


def logits(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expected_value_is_the_reverse_kl(estimator: Any) -> None:
    log_p, log_ref = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_ref)).sum()
    expected = (log_p.exp() * reference_kl(log_p, log_ref, estimator)).sum()
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_expected_gradient_is_that_of_a_kl(estimator: Any) -> None:
    """Over tokens sampled from the policy, k1 has the gradient of KL(p || ref) and k3 that of KL(ref || p)."""
    leaf = logits(0).requires_grad_()
    log_ref = logits(1).log_softmax(-1)
    log_p = leaf.log_softmax(-1)
    sampled = (log_p.exp().detach() * reference_kl(log_p, log_ref, estimator)).sum()
    reverse = (log_p.exp() * (log_p - log_ref)).sum()
    forward = (log_ref.exp() * (log_ref - log_p)).sum()
    exact = reverse if estimator == "k1" else forward
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (sampled, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def batch(**change: Any) -> tuple[LossInputs, Tensor]:
    """Off-policy inputs that every method accepts, and the logits."""
    generator = torch.Generator().manual_seed(3)
    leaf = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    stats = token_stats(leaf, targets, entropy="grad", filter_entropy=True)
    noise = torch.randn(3, TOKENS, generator=generator, dtype=torch.float64)
    old = stats.log_probs.detach() + 0.1 * noise[0]
    selection = torch.arange(TOKENS) % 3 == 0
    fields: dict[str, Any] = {
        "log_probs": stats.log_probs,
        "old_log_probs": old,
        "advantages": noise[1],
        "mask": torch.arange(TOKENS) != 4,
        "entropy": stats.entropy,
        "filter_entropy": stats.filter_entropy,
        "filter_extent": stats.filter_extent,
        "log_z": stats.log_z,
        "in_filter": stats.in_filter,
        "reference_log_probs": old + 0.5 * noise[2],
        "sequence_ids": torch.arange(TOKENS) // 5,
        "selection": selection,
        "denominator": 8,
    }
    return LossInputs(**fields | change), leaf


LENGTHS = torch.tensor([4.0, 5.0, 2.0], dtype=torch.float64)
"""Number of tokens that count in each response."""
WEIGHTS = {
    "tokens": lambda inputs: inputs.counted.double() / 8,
    "selected": lambda inputs: (inputs.counted & inputs.selection).double() / 8,
    "sequences": lambda inputs: inputs.counted.double() / LENGTHS[inputs.sequence_ids] / 8,
}


AVERAGES = {"gspo": "sequences", "sapo": "sequences", "high_entropy": "selected", "stapo": "selected"}
"""The other methods average over tokens."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_penalty_is_averaged_as_the_method_averages(name: str, estimator: Any) -> None:
    inputs, leaf = batch()
    plain = make_loss(name)
    loss = with_reference_kl(plain, coefficient=0.3, estimator=estimator)
    output = loss(inputs)
    weights = WEIGHTS[AVERAGES.get(name, "tokens")](inputs)
    assert inputs.reference_log_probs is not None
    kl = reference_kl(inputs.log_probs, inputs.reference_log_probs, estimator)
    want = plain(inputs).loss + 0.3 * (weights * kl).sum()
    torch.testing.assert_close(output.loss, want, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (output.loss, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert output.metrics["reference_kl"].value == pytest.approx(float(kl[inputs.counted].detach().mean()))
    assert output.metrics.keys() - plain(inputs).metrics.keys() == {"reference_kl"}


@pytest.mark.parametrize("aggregation", ["sequence_mean_token_mean", "constant_length"])
def test_the_penalty_follows_the_aggregation_setting(aggregation: Any) -> None:
    inputs, _ = batch()
    length = 9 if aggregation == "constant_length" else None
    loss = with_reference_kl(make_loss("grpo", aggregation=aggregation, constant_length=length), coefficient=1.0)
    weights = WEIGHTS["tokens"](inputs) / 9 if length else WEIGHTS["sequences"](inputs)
    assert inputs.reference_log_probs is not None
    kl = (weights * reference_kl(inputs.log_probs, inputs.reference_log_probs)).sum()
    torch.testing.assert_close(loss(inputs).loss - loss.loss(inputs).loss, kl, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_a_driver_sees_the_needs_of_the_wrapped_method(name: str) -> None:
    plain = make_loss(name)
    loss = with_reference_kl(plain, coefficient=0.1)
    assert loss.acts_without_advantage
    for what in ("selection", "denominator_counts", "proxy_source", "needs_proxy_kl", "token_separable"):
        assert getattr(loss, what) == getattr(plain, what)
    assert loss.token_stats_kwargs() == plain.token_stats_kwargs()
    assert torch.equal(loss.uses_proxy(torch.tensor([-1.0, 0.0])), plain.uses_proxy(torch.tensor([-1.0, 0.0])))


def test_masked_log_probs_may_be_anything() -> None:
    inputs, leaf = batch()
    assert inputs.reference_log_probs is not None
    broken = torch.where(inputs.counted, inputs.reference_log_probs, torch.inf)
    loss = with_reference_kl(make_loss("grpo"), coefficient=1.0)(batch(reference_log_probs=broken)[0]).loss
    assert torch.isfinite(loss)
    inputs, leaf = batch(reference_log_probs=broken)
    gradient = torch.autograd.grad(with_reference_kl(make_loss("grpo"), coefficient=1.0)(inputs).loss, leaf)[0]
    assert gradient.isfinite().all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficient must lie in"):
        with_reference_kl(make_loss("grpo"), coefficient=-1)
    with pytest.raises(ValueError, match="estimator must be one of k1, k3"):
        with_reference_kl(make_loss("grpo"), coefficient=1, estimator="k2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reference_kl needs LossInputs\.reference_log_probs"):
        with_reference_kl(make_loss("grpo"), coefficient=1)(batch(reference_log_probs=None)[0])
