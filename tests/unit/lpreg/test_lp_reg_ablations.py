"""The paper's ablations of Lp-Reg, each of which is a setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lpreg import LossInputs, PolicyLoss, SelectionRule, apply_rule, make_loss, token_stats

TOKENS, VOCAB = 120, 10


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    lagged = torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) * 2
    logits = lagged + 0.4 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    return {
        "logits": logits.requires_grad_(),
        "lagged": lagged,
        "targets": torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0],
        "advantages": torch.randn(TOKENS, generator=generator, dtype=torch.float64).round(),
    }


def run(loss: PolicyLoss, data: dict[str, Tensor]) -> tuple[Tensor, LossInputs]:
    """Gradient over the logits of the term that the loss adds to the policy gradient."""
    stats = token_stats(data["logits"], data["targets"], **loss.token_stats_kwargs())
    lagged = token_stats(data["lagged"], data["targets"], **loss.token_stats_kwargs())
    everything = torch.ones(TOKENS, dtype=torch.bool)
    selection = None
    if loss.selection is not None:
        selection = apply_rule(loss.selection, everything, log_probs=stats.log_probs, entropy=stats.entropy).mask
    inputs = LossInputs(
        log_probs=stats.log_probs,
        log_z=stats.log_z,
        in_filter=stats.in_filter,
        proxy_log_probs=lagged.proxy_log_probs,
        advantages=data["advantages"],
        selection=selection,
        denominator=TOKENS,
    )
    policy = -(data["advantages"] * inputs.ratio).mean()
    added = torch.autograd.grad(loss(inputs).loss - policy, data["logits"])[0]
    return added, inputs


def shift(added: Tensor, data: dict[str, Tensor]) -> Tensor:
    """[T], the advantage that would have this gradient."""
    onehot = torch.nn.functional.one_hot(data["targets"], VOCAB)
    direction = onehot - data["logits"].detach().softmax(-1)
    weights = -TOKENS * (added * direction).sum(-1) / direction.square().sum(-1)
    torch.testing.assert_close(added, -weights[:, None] * direction / TOKENS)
    return weights


def lp_reg(**settings: Any) -> PolicyLoss:
    return make_loss("lp_reg", **{"rho": 0.3, "min_p": 0.1} | settings)


@pytest.mark.parametrize(
    ("select_by", "rule"),
    [
        ("log_prob", SelectionRule(kind="lowest_log_prob", fraction=0.3)),
        ("entropy", SelectionRule(kind="highest_entropy", fraction=0.3)),
        ("random", SelectionRule(kind="random", fraction=0.3)),
        ("all", None),
    ],
)
def test_select_by(select_by: str, rule: SelectionRule | None) -> None:
    data, loss = batch(), lp_reg(select_by=select_by)
    assert loss.selection == rule
    added, inputs = run(loss, data)
    chosen = inputs.in_filter & (data["advantages"] < 0)
    if inputs.selection is not None:
        assert int(inputs.selection.sum()) == 36
        chosen &= inputs.selection
    assert chosen.any()
    want = torch.where(chosen, (-inputs.log_z.detach()).expm1(), 0.0)
    torch.testing.assert_close(shift(added, data), want)


def test_both_signs_excludes_tokens_without_advantage() -> None:
    data = batch()
    added, inputs = run(lp_reg(select_by="all", advantage_sign="both"), data)
    want = torch.where(inputs.in_filter & (data["advantages"] != 0), (-inputs.log_z.detach()).expm1(), 0.0)
    torch.testing.assert_close(shift(added, data), want)
    signs = torch.tensor([-1.0, 0.0, 2.0])
    assert lp_reg(advantage_sign="both").uses_proxy(signs).tolist() == [True, False, True]
    assert lp_reg().uses_proxy(signs).tolist() == [True, False, False]
    assert not make_loss("grpo").uses_proxy(signs).any()


def test_the_reverse_kl_on_policy_is_an_advantage_shift_of_beta_log_one_over_z() -> None:
    data = batch()
    loss = lp_reg(kl_estimator="reverse", beta=0.7)
    added, inputs = run(loss, data)
    chosen = inputs.selection & inputs.in_filter & (data["advantages"] < 0)
    want = torch.where(chosen, -0.7 * inputs.log_z.detach(), 0.0)
    torch.testing.assert_close(shift(added, data), want)
    metrics = loss(inputs).metrics
    assert metrics["advantage_shift"].value == pytest.approx(float(want[chosen].mean()))
    assert metrics["kl"].value == pytest.approx(float(inputs.log_z.detach()[chosen].square().mean() / 2))


def test_the_reverse_kl_over_the_whole_vocabulary_has_the_gradient_of_kl_from_policy_to_proxy() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    log_q = torch.randn(VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    want = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits)[0]

    every_token = logits.detach().expand(VOCAB, VOCAB).clone().requires_grad_()
    inputs = LossInputs(
        log_probs=token_stats(every_token, torch.arange(VOCAB)).log_probs,
        advantages=torch.full((VOCAB,), -1e-300, dtype=torch.float64),
        proxy_log_probs=log_q,
        denominator=1,
    )
    loss = make_loss("lp_reg", proxy_source="lagged", select_by="all", kl_estimator="reverse")(inputs).loss
    rows = torch.autograd.grad(loss, every_token)[0]
    torch.testing.assert_close((log_p.detach().exp()[:, None] * rows).sum(0), want)


def test_without_a_filter_only_the_proxy_of_another_policy_has_an_effect() -> None:
    data = batch()
    for estimator in ("k3", "full", "reverse"):
        added, inputs = run(lp_reg(min_p=0, kl_estimator=estimator), data)
        assert inputs.in_filter.all() and (inputs.log_z == 0).all()
        assert (added == 0).all()
    added, inputs = run(lp_reg(min_p=0, proxy_source="lagged"), data)
    log_q = data["lagged"].log_softmax(-1).gather(1, data["targets"][:, None])[:, 0]
    chosen = inputs.selection & (data["advantages"] < 0)
    want = torch.where(chosen, (log_q - inputs.log_probs.detach()).expm1(), 0.0)
    torch.testing.assert_close(shift(added, data), want)


def test_a_fixed_tau_above_every_selected_probability_has_no_effect() -> None:
    """The paper's 0.02 is such a tau whenever delta is below it, so the share of selected tokens is logged."""
    data = batch()
    loss = lp_reg(rho=0.05, fixed_tau=0.3)
    added, inputs = run(loss, data)
    assert inputs.log_probs[inputs.selection].exp().max() < 0.3
    assert (added == 0).all() and loss(inputs).metrics["selected_fraction"].value == 0
    added, _ = run(lp_reg(rho=0.5, fixed_tau=0.01), data)
    assert (added != 0).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_by": "covariance"}, "select_by must be one of log_prob, entropy, random, all"),
        ({"advantage_sign": "positive"}, "advantage_sign must be one of negative, both"),
        ({"select_by": "random", "selection_scope": "micro_batch_negatives"}, "selection_scope must be 'batch'"),
        ({"advantage_sign": "both", "selection_scope": "micro_batch_negatives"}, "selection_scope must be 'batch'"),
        ({"min_p": -0.1}, "min_p"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lp_reg(**settings)
