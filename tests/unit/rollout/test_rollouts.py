"""What a step knows about its sampled groups."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts, tokens_per_version
from megatron_rl.types import Prompt, Response, RewardResult


def group(number: int, *scores: float, response: Response | None = None) -> Group:
    response = Response([number], [0.0], "stop", 0) if response is None else response
    prompt = Prompt(f"p:{number}", (1,), "", None)
    rewards = tuple(RewardResult(score) for score in scores)
    return Group(number, number, prompt, 0, (response,) * len(scores), rewards)


SAMPLED = [group(10, 1, 1, 1), group(11, 0, 1), group(12, 0), group(13, 1, 0)]


def test_responses_keep_the_number_of_their_group_in_the_step() -> None:
    """Groups may differ in size."""
    rollouts = Rollouts(SAMPLED, np.array([True, False, True, True]), weight_version=0)
    assert rollouts.group_numbers.tolist() == [0, 0, 0, 2, 3, 3]
    assert [prompt.id for prompt, _, _ in rollouts.responses] == ["p:10"] * 3 + ["p:12"] + ["p:13"] * 2
    assert [group.number for group in rollouts.groups] == [10, 12, 13]


@pytest.mark.parametrize(
    ("drops_groups", "trained", "advantages", "share"),
    [
        (False, [True] * 4, [0, 0, 0, -1, 1, 0, 1, -1], 2 / 4),
        (False, [True] * 4, [0] * 8, 0.0),
        (True, [False, True, False, False], [-1, 1], 2 / 4),  # group 3 has a signal but no place in the step
        (True, [False, True, False, True], [-1, 1, 1, -1], 2 / 4),
        (False, [False, True, False, False], [-1, 1], 1 / 4),
    ],
)
def test_the_signal_fraction_counts_sampled_groups(
    drops_groups: bool, trained: list[bool], advantages: list[float], share: float
) -> None:
    rollouts = Rollouts(SAMPLED, np.array(trained), weight_version=0, drops_groups=drops_groups)
    assert rollouts.signal_fraction(np.array(advantages)) == share


def test_each_weight_version_counts_the_tokens_that_it_sampled() -> None:
    """A version without tokens is left out, and so are the tokens of a tool."""
    partial = Response([1, 2, 3, 4], [0.0] * 4, "stop", 3, ((1, 5),))
    tool = Response([1, 2, 3, 4], [0.0] * 4, "stop", 5, ((2, 6),), sampled_mask=[True, False, False, False])
    empty = Response([], [], "abort", 9)
    groups = [group(0, 1, 0, response=partial), group(1, 1, response=tool), group(2, 1, response=empty)]
    assert tokens_per_version(groups) == {3: 2, 5: 7}
    assert tokens_per_version([]) == {}
