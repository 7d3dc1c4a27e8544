"""Rates of outcomes, the limit that stops a run, and shaping by format."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.reward import FormatSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import check_failures, outcome_rates
from megatron_rl.reward.shaping import format_penalties, well_formed
from megatron_rl.types import Prompt, RewardResult

GOOD = RewardResult(1.0)
LATE = RewardResult(0.0, detail="took too long", outcome="timeout")
BROKEN = RewardResult(0.0, detail="KeyError: 'label'", outcome="error")


def test_rates() -> None:
    assert outcome_rates([GOOD, LATE, BROKEN, BROKEN]) == {
        "reward/timeout_fraction": 0.25,
        "reward/error_fraction": 0.5,
    }
    assert outcome_rates([]) == {"reward/timeout_fraction": 0.0, "reward/error_fraction": 0.0}


def test_too_many_failures_stop_with_examples() -> None:
    prompts = [Prompt("test:0", (1,), "", f"label {i}") for i in range(5)]
    results = [replace(r, text=f"response {i}") for i, r in enumerate([GOOD, GOOD, LATE, BROKEN, BROKEN])]
    graded = list(zip(prompts, results, strict=True))
    check_failures(graded, RewardSettings(name="mine:score", max_failed_fraction=0.6))
    check_failures([], RewardSettings(name="mine:score", max_failed_fraction=0.0))
    with pytest.raises(UserError) as caught:
        check_failures(graded, RewardSettings(name="mine:score", max_failed_fraction=0.5))
    message = str(caught.value)
    assert (
        "3 of 5 samples could not be graded by reward.name: mine:score" in message
        and "reward.max_failed_fraction is 0.5" in message
    )
    assert message.count("KeyError: 'label'") == 1, "one example of each kind"
    assert "'label 2'" in message and "'response 2'" in message


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("<think>a</think>b", True),
        ("x<think></think>", True),
        ("</think><think>", False),
        ("<think>a", False),
        ("<think><think></think>", False),
        ("<think></think></think>", False),
        ("", False),
    ],
)
def test_tags_once_and_in_order(text: str, good: bool) -> None:
    assert well_formed(text, ["<think>", "</think>"]) is good
    settings = FormatSettings(tags=["<think>", "</think>"], penalty=0.25)
    assert format_penalties([text], settings) == [0.0 if good else -0.25]


@given(st.lists(st.text("ab", max_size=3), min_size=3, max_size=3))
def test_text_between_the_tags_does_not_matter(parts: list[str]) -> None:
    assert well_formed(f"{parts[0]}<t>{parts[1]}</t>{parts[2]}", ["<t>", "</t>"])


def test_without_settings_nothing_is_shaped() -> None:
    assert format_penalties(["a", "b"], None) == [0.0, 0.0]
