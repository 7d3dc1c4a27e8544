"""Identities of Lp-Reg's proxy that no other test states; in fp64, against plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, make_loss, token_stats

TOKENS, VOCAB, MIN_P = 40, 25, 0.05


def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 2
    return logits.requires_grad_(), torch.randint(VOCAB, (TOKENS,), generator=generator)


def test_the_filter_is_a_threshold_on_the_logits() -> None:
    """p_v >= kappa max p means x_v >= max x + log kappa."""
    logits, _ = case()
    p = logits.softmax(-1)
    inside = p >= MIN_P * p.amax(-1, keepdim=True)
    assert torch.equal(inside, logits >= logits.amax(-1, keepdim=True) + math.log(MIN_P))
    assert 0 < inside.double().mean() < 1
    for v in range(VOCAB):
        assert torch.equal(token_stats(logits, torch.full((TOKENS,), v), min_p=MIN_P).in_filter, inside[:, v])


def test_the_kl_has_one_gradient_whether_or_not_the_proxy_is_held_fixed(dense: Callable) -> None:
    """The gradient is p - q, as long as the set of the filter does not change."""
    logits, targets = case()
    frozen = dense(logits, targets, min_p=MIN_P)
    inside = frozen.q > 0
    log_q = logits - torch.where(inside, logits, -1e9).logsumexp(-1, keepdim=True)
    attached = torch.where(inside, log_q.exp() * (log_q - frozen.log_p), 0.0).sum(-1)
    gradient = torch.autograd.grad(attached.sum(), logits)[0]
    torch.testing.assert_close(gradient, frozen.p - frozen.q)
    stats = token_stats(logits, targets, min_p=MIN_P)
    torch.testing.assert_close(torch.autograd.grad(-stats.log_z.sum(), logits)[0], gradient)


def test_k3_on_policy_pushes_the_sampled_token_by_the_filtered_mass(dense: Callable) -> None:
    """The gradient over the logits of tokens inside the filter is -((1 - Z) / Z) (onehot - p)."""
    logits, targets = case()
    stats, want = token_stats(logits, targets, min_p=MIN_P), dense(logits, targets, min_p=MIN_P)
    inputs = LossInputs(
        log_probs=stats.log_probs,
        log_z=stats.log_z,
        in_filter=stats.in_filter,
        advantages=torch.full((TOKENS,), -1e-300, dtype=torch.float64),
        selection=torch.ones(TOKENS, dtype=torch.bool),
        denominator=1,
    )
    gradient = torch.autograd.grad(make_loss("lp_reg", min_p=MIN_P)(inputs).loss, logits)[0]
    z = want.log_z.detach().exp()
    onehot = torch.nn.functional.one_hot(targets, VOCAB)
    pushed = torch.where(want.in_filter, (1 - z) / z, 0.0)
    assert 0 < want.in_filter.sum() < TOKENS and pushed.max() > 0.05
    torch.testing.assert_close(gradient, -pushed[:, None] * (onehot - want.p))


@pytest.mark.parametrize(("times", "protected"), [(13.5, True), (13.7, False)])
def test_the_published_clamp_ends_protection_at_a_thirteenth_of_the_proxy(times: float, protected: bool) -> None:
    """exp(d) - d - 1 reaches 10 where q / p is 13.61."""
    log_probs = torch.tensor([-math.log(times) - 1], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs,
        advantages=torch.tensor([-1e-300], dtype=torch.float64),
        proxy_log_probs=torch.tensor([-1.0], dtype=torch.float64),
        selection=torch.ones(1, dtype=torch.bool),
        denominator=1,
    )
    make_loss("lp_reg", proxy_source="lagged", k3_clamp=10.0)(inputs).loss.backward()
    assert log_probs.grad is not None
    assert (log_probs.grad.item() < -10) == protected


def test_padded_columns_would_move_the_kept_mass() -> None:
    """Padded columns never count, because untrained rows of an LM head give logits of about 0."""
    logits, targets = case()
    peaked = logits.detach() - 8
    padded = torch.cat([peaked, torch.zeros(TOKENS, 7, dtype=torch.float64)], 1)
    right, wrong = token_stats(padded, targets, vocab_size=VOCAB), token_stats(padded, targets)
    assert torch.equal(right.log_z, token_stats(peaked, targets).log_z)
    assert (right.log_z.exp() - wrong.log_z.exp()).abs().max() > 0.05


def test_the_largest_probability_is_one_over_the_sum_of_exponentials() -> None:
    """With this identity the backward can restore the filter from numbers that it has."""
    logits, targets = case()
    stats = token_stats(logits, targets)
    p_max = logits.softmax(-1).amax(-1)
    torch.testing.assert_close(p_max, 1 / (logits - stats.max_logit[:, None]).exp().sum(-1))
