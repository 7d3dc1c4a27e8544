"""Lp-Reg's term on any method: against the method `lp_reg`, what it needs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lpreg import LossInputs, SelectionRule, make_loss, token_stats, with_lp_reg
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.config.methods import method_needs, method_problems

TOKENS = 60
SETTINGS: dict[str, Any] = {"beta": 0.7, "min_p": 0.1}


def inputs(logits: torch.Tensor) -> LossInputs:
    """On-policy inputs in fp32."""
    generator = torch.Generator().manual_seed(1)
    stats = token_stats(logits, torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0], min_p=0.1)
    return LossInputs(
        log_probs=stats.log_probs,
        log_z=stats.log_z,
        in_filter=stats.in_filter,
        advantages=torch.randn(TOKENS, generator=generator).round(decimals=1),
        selection=torch.rand(TOKENS, generator=generator) < 0.5,
        denominator=TOKENS,
    )


@pytest.mark.parametrize("estimator", ["k3", "full", "reverse"])
@pytest.mark.parametrize("name", ["grpo", "dppo", "clip_higher", "up"])
def test_on_policy_it_has_the_gradient_of_lp_reg(name: str, estimator: str) -> None:
    logits = torch.randn(TOKENS, 12, generator=torch.Generator().manual_seed(0)).mul(2).requires_grad_()
    settings = SETTINGS | {"kl_estimator": estimator}
    losses = [with_lp_reg(make_loss(name), **settings), make_loss("lp_reg", **settings)]
    outputs = [loss(inputs(logits)) for loss in losses]
    assert 0 < outputs[1].metrics["selected_fraction"].value < 0.5
    gradients = [torch.autograd.grad(output.loss, logits)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    for metric, mean in outputs[1].metrics.items():
        assert outputs[0].metrics[metric].value == mean.value


def test_it_needs_what_the_method_and_the_term_need() -> None:
    needs = with_lp_reg(make_loss("entropy_bonus"), rho=0.2, proxy_source="old", kl_estimator="full").needs
    assert needs.acts_without_advantage and needs.needs_proxy_kl and needs.proxy_source == "old"
    assert needs.token_stats == {"entropy": "grad", "min_p": 0.02}
    assert needs.selection == SelectionRule(kind="lowest_log_prob", fraction=0.2)
    assert with_lp_reg(make_loss("gspo")).denominator_counts == "sequences"
    assert not with_lp_reg(make_loss("gspo")).token_separable


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("lp_reg", {}, "has Lp-Reg's term already"),
        ("kl_cov", {}, "selects tokens by a rule of its own, highest_covariance"),
        ("stapo", {}, "selects tokens by a rule of its own, not_spurious"),
        ("tre", {}, "filter is .*top_k"),
        ("grpo", {"rho": 2.0}, "rho must lie in"),
    ],
)
def test_what_does_not_go_together_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_lp_reg(make_loss(name), **settings)


def test_all_tokens_go_with_a_selection_of_the_methods_own() -> None:
    assert with_lp_reg(make_loss("kl_cov"), select_by="all").selection == make_loss("kl_cov").selection


@pytest.mark.parametrize("name", ["kl_cov", "clip_cov", "high_entropy"])
def test_the_metrics_of_the_method_keep_their_names(name: str) -> None:
    batch = inputs(torch.randn(TOKENS, 12, generator=torch.Generator().manual_seed(0)))
    plain = make_loss(name)(batch).metrics
    term = {"beta": 0.7, "min_p": 0.1, "select_by": "all"}
    both = with_lp_reg(make_loss(name), **term)(batch).metrics
    alone = with_lp_reg(make_loss("grpo"), **term)(batch).metrics
    assert {metric: both[metric].value for metric in plain} == {metric: mean.value for metric, mean in plain.items()}
    assert (
        both["lp_reg_selected_fraction"].value == alone["selected_fraction"].value != plain["selected_fraction"].value
    )
    assert both["kl"].value == alone["kl"].value


def test_the_configuration_puts_the_term_on_a_method() -> None:
    section = {"name": "dppo", "with_lp_reg": {"rho": 0.005, "kl_estimator": "full", "k3_clamp": 10.0}}
    algorithm = AlgorithmSettings.model_validate(section)
    loss = LossChoice.of(algorithm).make()
    want = with_lp_reg(make_loss("dppo"), rho=0.005, kl_estimator="full", k3_clamp=10.0, proxy_source="old")
    assert loss.settings == want.settings and loss.needs == want.needs == method_needs(algorithm)
    assert AlgorithmSettings.model_validate(algorithm.model_dump(mode="json")) == algorithm
    assert "with_lp_reg" not in AlgorithmSettings.model_validate({"name": "dppo"}).model_dump()


def test_a_threshold_that_another_one_replaces_is_not_written() -> None:
    algorithm = AlgorithmSettings.model_validate({"name": "dppo", "with_lp_reg": {"fixed_tau": 0.01}})
    written = algorithm.model_dump(mode="json")
    assert written["with_lp_reg"]["fixed_tau"] == 0.01 and "min_p" not in written["with_lp_reg"]
    again = AlgorithmSettings.model_validate(written)
    assert again == algorithm and method_problems(again) == []
    assert method_needs(again).token_stats == {"fixed_tau": 0.01}
    by_min_p = AlgorithmSettings.model_validate({"name": "dppo", "with_lp_reg": {"fixed_tau": "none", "min_p": 0.1}})
    assert method_problems(by_min_p) == [] and by_min_p.model_dump()["with_lp_reg"]["min_p"] == 0.1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "lp_reg", "with_lp_reg": {}}, "algorithm.with_lp_reg: the method has Lp-Reg's term already"),
        (
            {"name": "dppo", "with_lp_reg": {"advantage_sign": "both", "selection_scope": "micro_batch_negatives"}},
            "algorithm.with_lp_reg: selection_scope must be 'batch'",
        ),
        (
            {"name": "dppo", "with_lp_reg": {"fixed_tau": 0.01, "min_p": 0.1}},
            "algorithm.with_lp_reg.min_p is replaced by algorithm.with_lp_reg.fixed_tau; give only one of them",
        ),
    ],
)
def test_a_wrong_section_is_named(section: dict[str, Any], message: str) -> None:
    [(_, text)] = method_problems(AlgorithmSettings.model_validate(section))
    assert text.startswith(message)
