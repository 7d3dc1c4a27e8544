"""Metrics of what a method does to rare tokens."""

from __future__ import annotations

import math

import pytest
import torch

from lpreg import LossInputs, PolicyLoss, fused_loss, make_loss, token_stats, with_lp_reg, with_rarity_metrics
from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.config.algorithm import AlgorithmSettings


def inputs() -> LossInputs:
    """A rare and a frequent token of each sign, which all moved away in the direction of their advantage; ratio 1.5 or
    1 / 1.5."""
    p_old = torch.tensor([0.005, 0.6, 0.005, 0.6], dtype=torch.float64)
    ratio = torch.tensor([1.5, 1.5, 1 / 1.5, 1 / 1.5], dtype=torch.float64)
    return LossInputs(
        log_probs=(p_old * ratio).log().requires_grad_(),
        old_log_probs=p_old.log(),
        advantages=torch.tensor([2.0, 2.0, -1.0, -1.0], dtype=torch.float64),
        sequence_ids=torch.arange(4),
        log_z=torch.full((4,), math.log(0.9), dtype=torch.float64),
        in_filter=torch.ones(4, dtype=torch.bool),
        selection=torch.tensor([True, False, True, False]),
        denominator=4,
    )


def test_a_ratio_clip_stops_rare_tokens_and_a_bound_on_probabilities_does_not() -> None:
    grpo, dppo, both = (
        with_rarity_metrics(loss)(inputs()).metrics
        for loss in (make_loss("grpo"), make_loss("dppo", bound_low=0.1), with_lp_reg(make_loss("dppo", bound_low=0.1)))
    )
    for sign in ("positive", "negative"):
        for edge in ("0", "0.6"):
            assert grpo[f"rarity/{sign}/{edge}/stopped"].value == 1 and grpo[f"rarity/{sign}/{edge}/weight"].value == 0
        assert dppo[f"rarity/{sign}/0/stopped"].value == 0 and dppo[f"rarity/{sign}/0.6/stopped"].value == 1
    assert dppo["rarity/positive/0/weight"].value == pytest.approx(2 * 1.5)
    assert dppo["rarity/negative/0/weight"].value == pytest.approx(-1 / 1.5)
    # On the rare token of negative advantage k3 adds beta * (1/Z - 1), on the frequent one nothing.
    assert both["rarity/negative/0/weight"].value == pytest.approx(-1 / 1.5 + 1 / 0.9 - 1)
    assert both["rarity/negative/0.6/stopped"].value == 1
    assert grpo["rarity/positive/0/change"].value == pytest.approx(0.005 * 0.5)
    assert math.isnan(grpo["rarity/positive/0.3/weight"].value)


MEANS = {
    "tokens": make_loss("grpo"),
    "sequences": make_loss("grpo", aggregation="sequence_mean_token_mean"),
    "a constant length": make_loss("grpo", aggregation="constant_length", constant_length=100),
    "gates": make_loss("sapo"),
    "ratios of sequences": make_loss("gspo"),
    "probabilities": make_loss("dppo"),
    "weights of sequences": make_loss("vespo"),
    "a term around it": with_lp_reg(make_loss("sapo"), select_by="all"),
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_the_effective_advantage_does_not_depend_on_what_a_method_averages_over(loss: PolicyLoss) -> None:
    """On-policy, every method takes a token's advantage as it is."""
    sequence_ids = torch.tensor([0, 1, 1, 1, 1, 1])
    given = LossInputs(
        log_probs=torch.full((6,), -0.5, dtype=torch.float64).requires_grad_(),
        advantages=torch.full((6,), 1.5, dtype=torch.float64),
        mask=torch.tensor([True, True, True, True, True, False]),
        sequence_ids=sequence_ids,
        log_z=torch.zeros(6, dtype=torch.float64),
        in_filter=torch.ones(6, dtype=torch.bool),
        selection=torch.zeros(6, dtype=torch.bool),
        denominator=5 if loss.denominator_counts == "tokens" else 2,
    )
    assert with_rarity_metrics(loss)(given).metrics["rarity/positive/0.6/weight"].value == pytest.approx(1.5)


def test_loss_and_gradient_do_not_change_and_chunks_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (9,), generator=generator)
    fields = {"advantages": torch.randn(9, generator=generator, dtype=torch.float64), "denominator": 9}
    loss = with_rarity_metrics(make_loss("grpo"))
    output, _ = fused_loss(hidden, weight, targets, loss, fields, chunk_tokens=2)
    stats = token_stats(hidden @ weight.T, targets)
    whole = loss(LossInputs(log_probs=stats.log_probs, **fields))
    plain = make_loss("grpo")(LossInputs(log_probs=stats.log_probs, **fields))
    assert whole.loss.item() == plain.loss.item()
    gradients = [torch.autograd.grad(x.loss, hidden, retain_graph=True)[0] for x in (output, whole, plain)]
    torch.testing.assert_close(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[2])
    for name, mean in whole.metrics.items():
        assert output.metrics[name].value == pytest.approx(mean.value, nan_ok=True), name


def test_the_configuration_turns_the_metrics_on() -> None:
    loss = LossChoice.of(AlgorithmSettings.model_validate({"name": "dppo", "rarity_metrics": True})).make()
    assert loss.name == "rarity_metrics" and loss.needs == make_loss("dppo").needs
