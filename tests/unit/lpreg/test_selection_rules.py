"""apply_rule against the definitions, and the exact means and random draws that it uses."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import SelectionRule, apply_rule, make_loss
from lpreg.losses.registry import METHODS
from lpreg.selection.exact import exact_mean, uniform

values = st.floats(-1e6, 1e6)


@given(st.lists(values, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_exact_mean_is_the_same_in_any_order(numbers: list[float], random: Any) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float64)
    everything = torch.ones(len(numbers), dtype=torch.bool)
    got = exact_mean(tensor, everything, "x", None)
    want = float(sum(map(Fraction, numbers)) / len(numbers))
    assert got == pytest.approx(want, rel=1e-15, abs=2.0**-50)
    random.shuffle(numbers)
    assert exact_mean(torch.tensor(numbers, dtype=torch.float64), everything, "x", None) == got


def test_the_exact_mean_is_over_eligible_tokens_and_refuses_bad_values() -> None:
    numbers = torch.tensor([1.0, math.inf, 3.0, math.nan])
    assert exact_mean(numbers, numbers.isfinite(), "x", None) == 2.0
    assert exact_mean(numbers, torch.zeros(4, dtype=torch.bool), "x", None) == 0.0
    with pytest.raises(ValueError, match=r"x: 2 eligible values are NaN, infinite or .*on this rank at \[1, 3"):
        exact_mean(numbers, torch.ones(4, dtype=torch.bool), "x", None)


def split_mix(state: int) -> int:
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**63 - 1), max_size=20))
def test_draws_equal_split_mix_in_python_integers(seed: int, ids: list[int]) -> None:
    got = uniform(seed, torch.tensor(ids, dtype=torch.int64)).tolist()
    start = split_mix(seed)
    assert got == [(split_mix((start + i * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53 for i in ids]


def test_draws_are_uniform_and_uncorrelated() -> None:
    ids = torch.arange(20_000)
    one, other = uniform(0, ids), uniform(1, ids)
    histogram = torch.histc(one, 20, 0, 1)
    assert ((histogram - 1000).abs() < 150).all()  # five standard deviations
    for related in (other, one.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([one, related]))[0, 1])) < 0.04


def batch(tokens: int = 400, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "eligible": torch.rand(tokens, generator=generator) < 0.8,
        "log_probs": -(torch.randn(tokens, generator=generator).abs() ** 2) * 2,
        "entropy": torch.rand(tokens, generator=generator) * 3,
        "advantages": torch.randn(tokens, generator=generator).round(decimals=1),
        "token_ids": torch.randperm(tokens, generator=generator),
    }


def covariance(data: dict[str, Tensor]) -> Tensor:
    eligible = data["eligible"]
    a, log_p = data["advantages"].double(), data["log_probs"].double()
    return (a - a[eligible].mean()) * (log_p - log_p[eligible].mean())


@pytest.mark.parametrize("fraction", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["lowest_log_prob", "highest_entropy", "highest_covariance"])
def test_rankings_equal_a_sort(kind: Any, fraction: float) -> None:
    data = batch()
    got = apply_rule(SelectionRule(kind=kind, fraction=fraction), **data)
    ranking = {
        "lowest_log_prob": -data["log_probs"],
        "highest_entropy": data["entropy"],
        "highest_covariance": covariance(data),
    }
    scores, eligible = ranking[kind], data["eligible"]
    count = max(1, int(fraction * int(eligible.sum())))
    cut = scores[eligible].sort(descending=True).values[count - 1]
    torch.testing.assert_close(scores[got.mask].min(), cut)
    assert got.count == int(got.mask.sum()) and not (got.mask & ~eligible).any()
    assert torch.equal(got.mask, eligible & (scores >= cut - 1e-9))


def test_random_draws_the_share_and_leaves_ineligible_tokens_out() -> None:
    data = batch()
    rule = SelectionRule(kind="random", fraction=0.25)
    population = int(data["eligible"].sum())
    got = apply_rule(rule, data["eligible"], token_ids=data["token_ids"])
    assert got.count == int(got.mask.sum()) == int(0.25 * population) and got.population == population
    assert not (got.mask & ~data["eligible"]).any()
    other = apply_rule(rule, data["eligible"], token_ids=data["token_ids"], seed=1)
    assert 0.1 < (got.mask & other.mask).sum() / got.count < 0.4


def test_a_draw_within_a_range_of_covariance() -> None:
    data = batch()
    inside = data["eligible"] & (covariance(data) > 1) & (covariance(data) < 5)
    population, available = int(data["eligible"].sum()), int(inside.sum())
    assert 20 < available < 0.5 * population
    for fraction, count in ((0.02, int(0.02 * population)), (0.9, available), (1e-6, 1)):
        rule = SelectionRule(kind="random_in_covariance", fraction=fraction, covariance_range=(1.0, 5.0))
        got = apply_rule(rule, **data)
        assert got.count == int(got.mask.sum()) == count and not (got.mask & ~inside).any()
    nowhere = SelectionRule(kind="random_in_covariance", fraction=0.5, covariance_range=(1e5, 1e6))
    assert apply_rule(nowhere, **data).count == 0


@pytest.mark.parametrize(
    "rule", [rule for name in METHODS if (rule := make_loss(name).selection)], ids=lambda rule: rule.kind
)
def test_every_rule_is_independent_of_the_order_of_tokens(rule: SelectionRule) -> None:
    data = batch()
    rule = replace(rule, fraction=0.05)
    whole = apply_rule(rule, **data)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    shuffled = apply_rule(rule, **{name: value[order] for name, value in data.items()})
    assert torch.equal(shuffled.mask, whole.mask[order]) and whole.count >= 1
    assert (shuffled.threshold, shuffled.count) == (whole.threshold, whole.count)


def test_without_a_group_a_tokens_index_is_its_id() -> None:
    rule = SelectionRule(kind="random", fraction=0.3)
    everything = torch.ones(50, dtype=torch.bool)
    assert torch.equal(apply_rule(rule, everything).mask, apply_rule(rule, everything, token_ids=torch.arange(50)).mask)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "lowest_log_prob",
            {"log_probs": None},
            "log_probs must be given: the selection rule lowest_log_prob needs it",
        ),
        ("highest_entropy", {"entropy": None}, "entropy must be given"),
        ("highest_covariance", {"advantages": None}, "advantages must be given"),
        (
            "highest_covariance",
            {"log_probs": torch.full((400,), -math.inf)},
            "log_probs: .* eligible values are NaN, inf",
        ),
        ("highest_entropy", {"entropy": torch.full((400,), math.nan)}, "eligible tokens are NaN"),
        ("random", {"token_ids": torch.zeros(400)}, "token_ids must be int64"),
        ("random_in_covariance", {}, "covariance_range"),
        ("lowest_log_prob", {"entropy": torch.zeros(3)}, r"entropy has shape \[3\], but eligible has \[400\]"),
    ],
)
def test_bad_arguments_are_named(kind: Any, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_rule(SelectionRule(kind=kind, fraction=0.5), **batch() | change)


def test_a_ranking_by_covariance_takes_no_more_than_its_share_of_tokens_that_tie() -> None:
    """Equal advantages make every covariance 0; certain tokens of one response tie for the highest one."""
    rule = SelectionRule(kind="highest_covariance", fraction=2e-4)
    everything = torch.ones(5000, dtype=torch.bool)
    log_probs = -torch.rand(5000, generator=torch.Generator().manual_seed(0))
    equal = apply_rule(rule, everything, log_probs=log_probs, advantages=torch.ones(5000))
    assert equal.count == int(equal.mask.sum()) == 1

    log_probs[:50] = 0.0
    advantages = torch.zeros(5000)
    advantages[:100] = 1.0
    draws = [
        apply_rule(
            replace(rule, fraction=0.002), everything, log_probs=log_probs, advantages=advantages, seed=seed
        ).mask
        for seed in range(2)
    ]
    for drawn in draws:
        assert int(drawn.sum()) == 10 and not drawn[50:].any()
    assert not torch.equal(*draws)


def test_spurious_tokens_are_rare_certain_and_rewarded() -> None:
    rule = SelectionRule(kind="not_spurious", fraction=0.5, probability=0.1)
    values = {
        "log_probs": torch.tensor([-5.0, -5.0, -0.1, -5.0, -5.0, -0.1]),
        "entropy": torch.tensor([0.1, 2.0, 0.2, 0.3, 3.0, 1.0]),
        "advantages": torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0]),
    }
    chosen = apply_rule(rule, torch.ones(6, dtype=torch.bool), **values)
    assert chosen.mask.tolist() == [False, True, True, True, True, True]
    assert chosen.count == 5 and chosen.population == 6 and chosen.threshold == 1.0
    with pytest.raises(ValueError, match="entropy must be given: the selection rule not_spurious needs it"):
        apply_rule(rule, torch.ones(6, dtype=torch.bool), log_probs=values["log_probs"])


@pytest.mark.parametrize(("ties", "dropped"), [(0, 5), (4, 4), (5, 5), (6, 0), (50, 0), (100, 0)])
def test_tokens_that_tie_at_the_low_entropy_of_spurious_tokens_stay(ties: int, dropped: int) -> None:
    """The entropy must lie below the share's quantile, of 100 tokens the lowest entropy beyond the first 5."""
    entropy = torch.arange(100.0).clamp(min=10.0 if ties else 0.0)
    entropy[:ties] = 0.0
    rule = SelectionRule(kind="not_spurious", fraction=0.05, probability=0.01)
    chosen = apply_rule(
        rule,
        torch.ones(100, dtype=torch.bool),
        log_probs=torch.full((100,), -9.0),
        entropy=entropy.flip(0),
        advantages=torch.ones(100),
    )
    assert (~chosen.mask).sum() == chosen.population - chosen.count == dropped


def test_a_spurious_token_is_less_probable_than_the_threshold() -> None:
    """The threshold's own fp32 log-prob is not below it."""
    at = torch.tensor(0.01).log()
    log_probs = torch.stack([at, at.nextafter(torch.tensor(-9.0)), torch.zeros(())])
    rule = SelectionRule(kind="not_spurious", fraction=0.7, probability=0.01)
    values = {"entropy": torch.tensor([0.1, 0.2, 3.0]), "advantages": torch.ones(3)}
    chosen = apply_rule(rule, torch.ones(3, dtype=torch.bool), log_probs=log_probs, **values)
    assert chosen.mask.tolist() == [True, False, True]
