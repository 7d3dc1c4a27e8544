"""Every method against a plain restatement of its definition, token by token, on dense logits with autograd; fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import LossInputs, PolicyLoss, apply_rule, make_loss, token_stats, with_lp_reg
from lpreg.losses.registry import METHODS
from tests.dense_methods import DEFINITIONS, Batch, covariances

VOCAB = 9


def make_batch(lengths: list[int], drift: float, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    old = torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64) * 1.5
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = torch.rand(tokens, generator=generator) < 0.8
    mask[0] = True
    return Batch(
        logits=(old + drift * torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64)).requires_grad_(),
        old_logits=old,
        lagged_logits=old + drift * torch.randn(tokens, VOCAB, generator=generator, dtype=torch.float64),
        targets=torch.multinomial(old.softmax(-1), 1, generator=generator)[:, 0],
        advantages=torch.randn(len(lengths), generator=generator, dtype=torch.float64).round(decimals=1)[ids],
        mask=mask,
        sequence_ids=3 * ids + 5,
        update=torch.ones(tokens, dtype=torch.bool),
    )


def run(loss: PolicyLoss, data: Batch, *, on_policy: bool) -> Tensor:
    """Computes the loss as a trainer does, on one rank."""
    asked = loss.token_stats_kwargs()
    every_token = torch.ones_like(data.mask)
    old = token_stats(data.logits.detach() if on_policy else data.old_logits, data.targets, **asked)
    lagged = token_stats(data.lagged_logits, data.targets, proxy_rows=every_token, **asked)
    proxy = lagged.proxy_store
    if loss.proxy_source == "old":
        proxy = token_stats(data.old_logits, data.targets, proxy_rows=every_token, **asked).proxy_store
    stats = token_stats(data.logits, data.targets, proxy=proxy, **asked)
    selection = None
    if loss.selection is not None:
        selection = apply_rule(
            loss.selection, data.mask, log_probs=old.log_probs, entropy=old.entropy, advantages=data.advantages
        ).mask
    counts = {
        "tokens": int(data.mask.sum()),
        "sequences": len(data.sequence_ids.unique()),
        "selected_tokens": 0 if selection is None else max(1, int(selection.sum())),
    }
    return loss(
        LossInputs(
            log_probs=stats.log_probs,
            old_log_probs=None if on_policy else old.log_probs,
            advantages=data.advantages,
            mask=data.mask,
            entropy=stats.entropy,
            log_z=stats.log_z,
            in_filter=stats.in_filter,
            filter_entropy=stats.filter_entropy,
            filter_extent=stats.filter_extent,
            old_log_z=old.log_z,
            old_in_filter=old.in_filter,
            proxy_kl=stats.proxy_kl,
            proxy_log_probs=lagged.proxy_log_probs,
            sequence_ids=data.sequence_ids,
            selection=selection,
            denominator=counts[loss.denominator_counts],
        )
    ).loss


def cut_is_clear(scores: dict[int, float], share: float) -> bool:
    """Whether rounding cannot change which scores are the highest."""
    ranked = sorted(scores.values(), reverse=True)
    count = max(1, math.floor(round(share * len(ranked), 9)))
    return count == len(ranked) or ranked[count - 1] - ranked[count] > 1e-9


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    drift=st.sampled_from([0.05, 0.6]),
    seed=st.integers(0, 1000),
    on_policy=st.booleans(),
)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_method_equals_its_definition(
    name: str, lengths: list[int], drift: float, seed: int, on_policy: bool
) -> None:
    loss, definition = DEFINITIONS[name]
    data = make_batch(lengths, drift, seed)
    # If an advantage equals the mean, covariances are equal up to rounding, so that no token is the highest.
    assume(name != "kl_cov" or cut_is_clear(covariances(data, on_policy), 0.3))
    got, want = run(loss, data, on_policy=on_policy), definition(data, on_policy)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(value, data.logits)[0] for value in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_every_method_has_a_definition_here() -> None:
    assert {loss.name for loss, _ in DEFINITIONS.values()} == {*METHODS, "with_lp_reg"}


# ------------------------------------------------------------- what follows from them


def gradient(loss: PolicyLoss, data: Batch, *, on_policy: bool) -> Tensor:
    return torch.autograd.grad(run(loss, data, on_policy=on_policy), data.logits)[0]


@pytest.mark.parametrize("name", ["clip_higher", "dual_clip", "cispo", "kl_cov", "dppo", "drpo", "up", "vespo"])
def test_on_policy_methods_equal_the_plain_policy_gradient(name: str) -> None:
    data = make_batch([8, 5, 9], 0.5, 2)
    data.advantages[8:] *= -1
    want = gradient(make_loss("grpo"), data, on_policy=True)
    torch.testing.assert_close(gradient(make_loss(name), data, on_policy=True), want)
    assert not torch.allclose(gradient(make_loss(name), data, on_policy=False), want)


@pytest.mark.parametrize("name", ["gspo", "sapo"])
def test_on_policy_it_is_the_policy_gradient_averaged_over_responses(name: str) -> None:
    data = make_batch([8, 5, 9], 0.5, 2)
    want = gradient(make_loss("grpo", aggregation="sequence_mean_token_mean"), data, on_policy=True)
    torch.testing.assert_close(gradient(make_loss(name), data, on_policy=True), want)


def test_gspo_in_its_token_form_gives_each_token_its_own_advantage() -> None:
    data = make_batch([4], 0.0, 0)
    data.mask[:] = True
    data.advantages = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    got = gradient(make_loss("gspo"), data, on_policy=False)
    torch.testing.assert_close(got, gradient(make_loss("grpo"), data, on_policy=True), rtol=1e-9, atol=1e-12)


def test_dual_clip_bounds_the_loss_of_a_token_with_a_large_ratio() -> None:
    log_probs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = make_loss("dual_clip")(
        LossInputs(
            log_probs=log_probs,
            old_log_probs=torch.full((2,), -math.log(50), dtype=torch.float64),
            advantages=torch.tensor([-2.0, 2.0], dtype=torch.float64),
            denominator=1,
        )
    )
    assert out.loss.item() == pytest.approx(2 * 10 - 2 * 1.2)
    assert torch.autograd.grad(out.loss, log_probs)[0].tolist() == [0.0, 0.0]
    assert out.metrics["dual_clip_fraction"].value == 0.5 and out.metrics["clip_fraction"].value == 1


def test_cispo_keeps_the_gradient_of_tokens_that_ppo_drops() -> None:
    log_probs = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    fields: Any = {"log_probs": log_probs, "old_log_probs": torch.full((1,), -math.log(50.0), dtype=torch.float64)}
    inputs = LossInputs(**fields, advantages=torch.ones(1, dtype=torch.float64), denominator=1)
    for name, want in (("grpo", 0.0), ("cispo", -5.0)):
        assert torch.autograd.grad(make_loss(name)(inputs).loss, log_probs)[0].item() == want


@pytest.mark.parametrize("name", ["kl_cov", "entropy_bonus", "tre"])
def test_tokens_without_advantage_still_have_a_gradient(name: str) -> None:
    data = make_batch([8, 6], 0.5, 3)
    data.advantages = torch.zeros(14, dtype=torch.float64)
    assert gradient(make_loss(name), data, on_policy=False).abs().sum() > 0
    assert make_loss(name).acts_without_advantage


@pytest.mark.parametrize("name", [name for name in DEFINITIONS if not DEFINITIONS[name][0].acts_without_advantage])
def test_tokens_without_advantage_have_no_gradient_in_other_methods(name: str) -> None:
    loss, _ = DEFINITIONS[name]
    data = make_batch([8, 6, 4], 0.5, 3)
    data.advantages = torch.where(data.sequence_ids == 8, 0.0, 1.0).double()
    assert (gradient(loss, data, on_policy=False)[data.advantages == 0] == 0).all()


def test_the_entropy_coefficient_moves_towards_the_target() -> None:
    adapted = make_loss("entropy_bonus", coefficient=0.01, target=0.3, step=0.004)
    coefficient = None
    seen = []
    for entropy in (0.2, 0.1, 0.4, 0.3, 0.5, 0.9):
        coefficient = adapted.next_entropy_coefficient(coefficient, entropy)
        seen.append(coefficient)
    assert seen == pytest.approx([0.014, 0.018, 0.014, 0.010, 0.006, 0.002])
    assert adapted.next_entropy_coefficient(0.002, 0.9) == 0
    assert adapted.next_entropy_coefficient(0.5, 0.9) > 0, "above the target the bonus fades; Skywork-OR1 leaves it out"
    assert adapted.next_entropy_coefficient(0.5, 0.1) > 0.5, "the coefficient has no upper bound"
    assert with_lp_reg(adapted).next_entropy_coefficient(None, 0.1) == pytest.approx(0.014)
    assert make_loss("entropy_bonus").next_entropy_coefficient(None, 0.1) is None


def test_a_given_entropy_coefficient_replaces_the_setting() -> None:
    data = make_batch([4], 0.0, 0)
    stats = token_stats(data.logits, data.targets, entropy="grad")
    inputs = LossInputs(log_probs=stats.log_probs, advantages=data.advantages, entropy=stats.entropy, denominator=4)
    given = replace(inputs, entropy_coefficient=torch.full((4,), 0.3, dtype=torch.float64))
    got, want = make_loss("entropy_bonus")(given), make_loss("entropy_bonus", coefficient=0.3)(inputs)
    assert got.loss.item() == want.loss.item()
    assert got.metrics["entropy_coefficient"].value == want.metrics["entropy_coefficient"].value == 0.3


def test_the_entropy_must_carry_its_gradient() -> None:
    data = make_batch([4], 0.0, 0)
    stats = token_stats(data.logits, data.targets)
    inputs = LossInputs(log_probs=stats.log_probs, advantages=data.advantages, entropy=stats.entropy, denominator=4)
    with pytest.raises(ValueError, match=r"entropy_bonus needs LossInputs\.entropy with its gradient"):
        make_loss("entropy_bonus")(inputs)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("gspo", "sequence_ids"),
        ("sapo", "sequence_ids"),
        ("vespo", "sequence_ids"),
        ("stapo", "selection"),
        ("kl_cov", "selection"),
        ("clip_cov", "selection"),
        ("high_entropy", "selection"),
        ("entropy_bonus", "entropy"),
        ("tre", "filter_entropy"),
    ],
)
def test_a_missing_input_is_named(name: str, missing: str) -> None:
    inputs = LossInputs(log_probs=torch.zeros(3), advantages=torch.zeros(3), denominator=3)
    with pytest.raises(ValueError, match=rf"{name} needs LossInputs\.{missing}$"):
        make_loss(name)(inputs)
