"""The overlong penalty and the groups that dynamic sampling redraws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpreg import group_advantages, overlong_penalty, uninformative


def test_the_penalty_grows_linearly_over_the_buffer() -> None:
    lengths = torch.tensor([0, 80, 81, 90, 100, 101, 5000])
    got = overlong_penalty(lengths, max_length=100, buffer=20)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]))
    assert got.dtype == torch.float32


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 1.0, 0.1])), max_size=30))
def test_groups_without_signal_are_those_without_an_advantage(responses: list[tuple[int, float]]) -> None:
    ids = torch.tensor([group for group, _ in responses], dtype=torch.int64)
    rewards = torch.tensor([reward for _, reward in responses])
    got = uninformative(rewards, ids)
    for (group, _), dull in zip(responses, got.tolist(), strict=True):
        assert dull == (len({r for g, r in responses if g == group}) == 1)
    assert (group_advantages(rewards, ids)[got] == 0).all()


@pytest.mark.parametrize(
    ("lengths", "change", "message"),
    [
        (torch.tensor([1.0]), {}, "lengths must be integers"),
        (torch.tensor([-1]), {}, "lengths must be integers of 0 or more"),
        (torch.tensor([1]), {"buffer": 0}, r"buffer must lie in \[1, max_length = 10\], got 0"),
        (torch.tensor([1]), {"buffer": 11}, "buffer"),
    ],
)
def test_bad_arguments_are_named(lengths: torch.Tensor, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(lengths, **{"max_length": 10, "buffer": 5} | change)


def test_bad_rewards_are_named() -> None:
    with pytest.raises(ValueError, match="rewards must be finite"):
        uninformative(torch.tensor([float("inf")]), torch.tensor([0]))
    with pytest.raises(ValueError, match="both be"):
        uninformative(torch.tensor([1.0]), torch.tensor([0, 1]))
