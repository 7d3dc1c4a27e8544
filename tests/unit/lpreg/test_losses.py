"""GRPO and Lp-Reg against their formulae, token by token, and identities between the estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, make_loss, select_lowest, token_stats

TOKENS, VOCAB = 80, 12
# These tokens are regularised, and the policy term is negligible.
BARELY_NEGATIVE = -1e-300


def batch(seed: int = 0) -> dict[str, Any]:
    """Logits of a policy, of an older one, sampled tokens and advantages; fp64."""
    generator = torch.Generator().manual_seed(seed)
    old_logits = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 2
    logits = old_logits + 0.3 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return {
        "logits": logits.requires_grad_(),
        "old_logits": old_logits,
        "targets": torch.multinomial(old_logits.softmax(-1), 1, generator=generator)[:, 0],
        "advantages": torch.randn(TOKENS, generator=generator, dtype=torch.float64).round(decimals=1),
    }


def lp_reg_inputs(data: dict[str, Any], rho: float = 0.4, **change: Any) -> LossInputs:
    """On-policy inputs with the policy's own filter; min_p = 0.1, so that the filter has an effect."""
    stats = token_stats(data["logits"], data["targets"], min_p=0.1)
    everything = torch.ones(TOKENS, dtype=torch.bool)
    fields = {
        "log_probs": stats.log_probs,
        "log_z": stats.log_z,
        "in_filter": stats.in_filter,
        "advantages": data["advantages"],
        "selection": select_lowest(stats.log_probs, everything, rho).mask,
        "denominator": TOKENS,
    }
    return LossInputs(**fields | change)


def gradient(loss: Tensor, data: dict[str, Any]) -> Tensor:
    return torch.autograd.grad(loss, data["logits"], retain_graph=True)[0]


def policy_gradient(weights: Tensor, data: dict[str, Any]) -> Tensor:
    """Gradient of -sum(weights * log p(target)) / TOKENS."""
    p = data["logits"].detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(data["targets"], VOCAB)
    return -weights[:, None] * (onehot - p) / TOKENS


def lp_reg(**settings: Any) -> Callable:
    return make_loss("lp_reg", rho=0.4, min_p=0.1, **settings)


def test_grpo_is_the_ppo_clip() -> None:
    log_ratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    log_probs = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(5, dtype=torch.bool)
    out = make_loss("grpo")(
        LossInputs(
            log_probs=log_probs, old_log_probs=-1.0 - log_ratio, advantages=advantages, mask=mask, denominator=10
        )
    )
    up, down = log_ratio[1].exp(), log_ratio[3].exp()
    want = [-2.0, -1.2, up, -down, 0.8]
    torch.testing.assert_close(out.loss, sum(torch.as_tensor(term, dtype=torch.float64) for term in want) / 10)
    out.loss.backward()
    clipped = torch.tensor([False, True, False, False, True])
    torch.testing.assert_close(log_probs.grad, torch.where(clipped, 0, -advantages * log_ratio.exp()) / 10)
    assert out.metrics["clip_fraction"].value == pytest.approx(0.4)
    assert out.metrics["ratio"].value == pytest.approx(float(log_ratio.exp().mean()))


def test_grpo_without_old_log_probs_is_the_plain_policy_gradient() -> None:
    data = batch()
    inputs = lp_reg_inputs(data)
    out = make_loss("grpo")(inputs)
    torch.testing.assert_close(gradient(out.loss, data), policy_gradient(data["advantages"], data))
    assert out.metrics["ratio"].value == 1 and out.metrics["clip_fraction"].value == 0


def test_masked_tokens_have_no_loss_and_are_not_counted() -> None:
    data = batch()
    mask = torch.arange(TOKENS) % 3 > 0
    for loss in (make_loss("grpo"), lp_reg(), lp_reg(selection_scope="micro_batch_negatives")):
        out = loss(lp_reg_inputs(data, mask=mask))
        assert (gradient(out.loss, data)[~mask] == 0).all()
        assert float(out.metrics["ratio"].count) == int(mask.sum())


def test_k3_on_policy_is_an_advantage_shift_of_beta_times_one_over_z_minus_one() -> None:
    data = batch()
    inputs = lp_reg_inputs(data)
    out = lp_reg(beta=0.7)(inputs)
    chosen = inputs.selection & inputs.in_filter & (inputs.advantages < 0)
    assert 3 < chosen.sum() < inputs.selection.sum()
    shift = 0.7 * torch.where(chosen, (-inputs.log_z).expm1(), 0).detach()
    torch.testing.assert_close(gradient(out.loss, data), policy_gradient(data["advantages"] + shift, data))
    assert out.metrics["advantage_shift"].value == pytest.approx(float(shift[chosen].mean()))
    one_minus_z = 1 - inputs.log_z.detach()[chosen].exp()
    assert out.metrics["selected_one_minus_z"].value == pytest.approx(float(one_minus_z.mean()))
    d = -inputs.log_z[chosen].detach()
    assert out.metrics["kl"].value == pytest.approx(float((d.exp() - d - 1).mean()))


def test_full_adds_the_kl_to_the_frozen_proxy(dense: Callable) -> None:
    data = batch()
    inputs = lp_reg_inputs(data)
    out = lp_reg(beta=0.7, kl_estimator="full")(inputs)
    want = dense(data["logits"], data["targets"], min_p=0.1)
    kl = (want.q * (want.q.log() - want.log_p).nan_to_num(neginf=0.0)).sum(-1)
    chosen = inputs.selection & inputs.in_filter & (inputs.advantages < 0)
    ratio = (want.log_probs - want.log_probs.detach()).exp()
    by_hand = (-inputs.advantages * ratio + 0.7 * torch.where(chosen, kl, 0)).sum() / TOKENS
    torch.testing.assert_close(out.loss, by_hand)
    torch.testing.assert_close(gradient(out.loss, data), gradient(by_hand, data))
    assert out.metrics["kl"].value == pytest.approx(float(kl.detach()[chosen].mean()))


def test_k3_over_the_whole_vocabulary_has_the_full_gradient_and_the_value_of_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, VOCAB, generator=generator, dtype=torch.float64) * 1.5
    every_token = logits.expand(VOCAB, VOCAB).clone().requires_grad_()
    log_p = token_stats(every_token, torch.arange(VOCAB)).log_probs
    p = logits[0].softmax(-1)
    # A proxy that keeps the whole vocabulary, so that both divergences are finite.
    log_q = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)
    inputs = LossInputs(
        log_probs=log_p,
        advantages=torch.full((VOCAB,), BARELY_NEGATIVE, dtype=torch.float64),
        proxy_log_probs=log_q,
        selection=torch.ones(VOCAB, dtype=torch.bool),
        denominator=1,
    )
    loss = make_loss("lp_reg", proxy_source="lagged", beta=1.0)(inputs).loss
    rows = torch.autograd.grad(loss, every_token)[0]
    torch.testing.assert_close((p[:, None] * rows).sum(0), p - log_q.exp())
    d = log_q - log_p.detach()
    torch.testing.assert_close((p * (d.exp() - d - 1)).sum(), (p * (p.log() - log_q)).sum())


@pytest.mark.parametrize("source", ["old", "lagged"])
def test_k3_off_policy_pulls_by_one_minus_q_over_p(source: str) -> None:
    data = batch()
    old = token_stats(data["old_logits"], data["targets"], min_p=0.1)
    inputs = lp_reg_inputs(
        data,
        old_log_probs=old.log_probs,
        old_log_z=old.log_z,
        old_in_filter=old.in_filter,
        proxy_log_probs=old.proxy_log_probs,
    )
    out = lp_reg(proxy_source=source)(inputs)
    chosen = inputs.selection & old.in_filter & (inputs.advantages < 0)
    p, q = inputs.log_probs.detach().exp(), old.proxy_log_probs.exp()
    ratio = (inputs.log_probs.detach() - old.log_probs).exp()
    weights = data["advantages"] * ratio - torch.where(chosen, 1 - q / p, 0)
    torch.testing.assert_close(gradient(out.loss, data), policy_gradient(weights, data))
    assert ("selected_one_minus_z" in out.metrics) == (source == "old")


def test_the_old_proxy_of_a_single_update_is_the_current_one() -> None:
    data = batch()
    current, old = lp_reg()(lp_reg_inputs(data)), lp_reg(proxy_source="old")(lp_reg_inputs(data))
    assert torch.equal(gradient(current.loss, data), gradient(old.loss, data))


def test_require_below_proxy_skips_tokens_above_the_proxy() -> None:
    data = batch()
    lagged = token_stats(data["old_logits"], data["targets"], min_p=0.1).proxy_log_probs
    inputs = lp_reg_inputs(data, proxy_log_probs=lagged)
    gated = lp_reg(proxy_source="lagged", require_below_proxy=True)(inputs)
    above = inputs.log_probs.detach() >= lagged
    want = lp_reg(proxy_source="lagged")(lp_reg_inputs(data, proxy_log_probs=torch.where(above, -torch.inf, lagged)))
    free = lp_reg(proxy_source="lagged")(inputs)
    torch.testing.assert_close(gradient(gated.loss, data), gradient(want.loss, data))
    assert gated.metrics["selected_fraction"].total < free.metrics["selected_fraction"].total


def test_the_clamp_bounds_the_value_and_ends_the_gradient() -> None:
    log_probs = torch.tensor([-2.0, -6.0], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        log_probs=log_probs,
        advantages=torch.full((2,), BARELY_NEGATIVE, dtype=torch.float64),
        proxy_log_probs=torch.full((2,), -1.0, dtype=torch.float64),
        selection=torch.ones(2, dtype=torch.bool),
        denominator=1,
    )
    out = make_loss("lp_reg", proxy_source="lagged", k3_clamp=10.0)(inputs)
    e = torch.e
    assert out.loss.item() == pytest.approx((e - 2) + 10.0)
    assert out.metrics["clamped_fraction"].value == 0.5
    out.loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([1 - e, 0.0])


@pytest.mark.parametrize(("paper_form", "gradient_beyond"), [(True, 0.0), (False, 12.0)])
def test_the_upper_bound_on_negative_advantages(paper_form: bool, gradient_beyond: float) -> None:
    log_probs = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([12.0, 12.0, 0.001, 0.001], dtype=torch.float64)
    inputs = LossInputs(
        log_probs=log_probs,
        old_log_probs=-ratio.log(),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64),
        proxy_log_probs=torch.full((4,), -torch.inf, dtype=torch.float64),
        selection=torch.zeros(4, dtype=torch.bool),
        denominator=1,
    )
    out = make_loss("lp_reg", proxy_source="lagged", clip_negative_upper=paper_form)(inputs)
    out.loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([0.0, gradient_beyond, -0.001, 0.001])
    assert out.metrics["clip_fraction"].value == (0.5 if paper_form else 0.25)
    assert out.metrics["kl"].value != out.metrics["kl"].value  # nothing selected: no mean


def test_clip_low_holds_for_negative_advantages() -> None:
    log_probs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = make_loss("lp_reg", proxy_source="lagged", clip_low=0.2)(
        LossInputs(
            log_probs=log_probs,
            old_log_probs=torch.full((2,), 1.0, dtype=torch.float64),
            advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
            proxy_log_probs=torch.zeros(2, dtype=torch.float64),
            selection=torch.zeros(2, dtype=torch.bool),
            denominator=1,
        )
    )
    out.loss.backward()
    assert log_probs.grad.tolist() == pytest.approx([-(torch.e**-1), 0.0])


def test_micro_batch_negatives_ranks_only_negative_tokens_of_the_micro_batch() -> None:
    data = batch()
    inputs = lp_reg_inputs(data, selection=None)
    out = make_loss("lp_reg", rho=0.25, selection_scope="micro_batch_negatives")(inputs)
    negative = inputs.advantages < 0
    count = int(0.25 * negative.sum())
    low = inputs.log_probs.detach()[negative].sort().values[:count]
    assert float(out.metrics["candidate_kept_fraction"].count) == count
    assert float(out.metrics["selected_fraction"].total) == int(
        (inputs.in_filter & negative & (inputs.log_probs <= low[-1])).sum()
    )


def test_a_single_negative_token_is_selected() -> None:
    inputs = LossInputs(
        log_probs=torch.tensor([-3.0, -2.0]),
        advantages=torch.tensor([-1.0, 1.0]),
        log_z=torch.tensor([-0.5, -0.5]),
        in_filter=torch.tensor([True, True]),
        denominator=2,
    )
    out = make_loss.preset("lp_reg", "reference")(inputs)
    assert out.metrics["selected_fraction"].value == 0.5


def test_filtered_tokens_leave_the_gradient_finite() -> None:
    data = batch()
    for settings in ({}, {"kl_estimator": "full"}, {"k3_clamp": 10.0}, {"require_below_proxy": True}):
        inputs = lp_reg_inputs(data, in_filter=torch.zeros(TOKENS, dtype=torch.bool))
        out = lp_reg(**settings)(inputs)
        torch.testing.assert_close(gradient(out.loss, data), policy_gradient(data["advantages"], data))
        assert out.metrics["selected_fraction"].value == 0 and out.metrics["candidate_kept_fraction"].value == 0


def test_a_fixed_tau_that_keeps_no_token_adds_no_term() -> None:
    data = batch()
    stats = token_stats(data["logits"], data["targets"], fixed_tau=0.99)
    assert (stats.log_z == -torch.inf).any()
    for estimator in ("k3", "full"):
        inputs = lp_reg_inputs(data, log_probs=stats.log_probs, log_z=stats.log_z, in_filter=stats.in_filter)
        out = lp_reg(fixed_tau=0.99, kl_estimator=estimator)(inputs)
        assert out.loss.isfinite() and gradient(out.loss, data).isfinite().all()
