"""group_advantages: the formulae of its estimators, and groups without a signal."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpreg import group_advantages


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-3, 3, width=32)), min_size=1, max_size=40))
def test_equals_the_formula_in_any_order_of_groups(responses: list[tuple[int, float]]) -> None:
    ids = torch.tensor([group for group, _ in responses])
    rewards = torch.tensor([reward for _, reward in responses], dtype=torch.float64)
    got = group_advantages(rewards, ids).tolist()
    for (group, reward), advantage in zip(responses, got, strict=True):
        members = [r for g, r in responses if g == group]
        if len(set(members)) == 1:
            assert advantage == 0
        else:
            want = (reward - statistics.fmean(members)) / (statistics.stdev(members) + 1e-6)
            assert advantage == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_binary_rewards_by_hand() -> None:
    # One success in four: mean .25, Bessel std .5.
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([7, 7, 7, 7]), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([1.5, -0.5, -0.5, -0.5]))


def test_equal_rewards_and_a_group_of_one_give_exactly_zero() -> None:
    got = group_advantages(torch.tensor([0.1] * 7 + [3.0]), torch.tensor([0] * 7 + [1]), eps=0.0)
    assert (got == 0).all()


def test_integer_rewards_give_fp32_and_an_empty_batch_is_empty() -> None:
    assert group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0])).dtype == torch.float32
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3, width=32)), min_size=1, max_size=30),
    st.sampled_from(["dr_grpo", "rloo", "reinforce_plus_plus"]),
)
def test_the_other_estimators_equal_their_formulae(responses: list[tuple[int, float]], estimator: str) -> None:
    ids = torch.tensor([group for group, _ in responses])
    rewards = torch.tensor([reward for _, reward in responses], dtype=torch.float64)
    got = group_advantages(rewards, ids, estimator=estimator).tolist()
    everyone = [reward for _, reward in responses]
    for i, ((group, reward), advantage) in enumerate(zip(responses, got, strict=True)):
        members = [r for g, r in responses if g == group]
        others = [r for j, (g, r) in enumerate(responses) if g == group and j != i]
        if len(set(everyone if estimator == "reinforce_plus_plus" else members)) == 1:
            assert advantage == 0
            continue
        if estimator == "dr_grpo":
            want = reward - statistics.fmean(members)
        elif estimator == "rloo":
            want = reward - statistics.fmean(others)
        else:
            want = (reward - statistics.fmean(everyone)) / (statistics.stdev(everyone) + 1e-6)
        assert advantage == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_maxrl_divides_by_the_mean_of_the_group() -> None:
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    got = group_advantages(rewards, ids, estimator="maxrl")
    torch.testing.assert_close(got, torch.tensor([3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"rewards\[1\] is -0\.5, but maxrl takes no negative rewards"):
        group_advantages(torch.tensor([1.0, -0.5]), torch.tensor([0, 0]), estimator="maxrl")


def test_reinforce_plus_plus_compares_rewards_across_groups() -> None:
    rewards, ids = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    assert (group_advantages(rewards, ids) == 0).all()
    got = group_advantages(rewards, ids, estimator="reinforce_plus_plus", eps=0.0)
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, -1.0, -1.0]) * math.sqrt(3) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "rloo2"}, "'rloo2' is not known; known: grpo"),
        ({"group_ids": torch.tensor([0, 0, 1])}, r"\[2\] and \[3\]"),
        ({"group_ids": torch.tensor([0.0, 0.0])}, "integers"),
        ({"rewards": torch.tensor([1.0, math.nan])}, r"rewards\[1\] is nan"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"rewards": torch.tensor([1.0, 0.0]), "group_ids": torch.tensor([0, 0])} | change
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)


def test_a_function_as_estimator() -> None:
    rewards, groups = torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])
    seen = []

    def estimator(rewards: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        seen.append((rewards.dtype, group_ids))
        return rewards * 3

    assert group_advantages(rewards, groups, estimator=estimator).tolist() == [3.0, 0.0, 3.0]
    assert seen[0][0] == torch.float64 and seen[0][1] is groups


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2), r"must return a tensor of shape \[3\], one advantage per reward, not \[2\]"),
        ([0.0, 0.0, 0.0], "not list"),
        (torch.tensor([0.0, float("nan"), 0.0]), r"advantages\[1\] is nan; advantages must be finite"),
    ],
)
def test_a_function_that_returns_no_advantages_is_refused(returned: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.ones(3), torch.zeros(3, dtype=torch.int64), estimator=lambda *_: returned)
