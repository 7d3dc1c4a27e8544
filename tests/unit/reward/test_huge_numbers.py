"""Numbers of hundreds and thousands of digits in labels and answers: a verdict, not an error of the verifier.

A response whose grading fails has no reward, so a policy must not be able to make the verifier fail.
"""

from __future__ import annotations

import json
import math

import pytest

from megatron_rl.reward.code.cases import Call, passes, read_cases
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.reward.maths.verifier import verify_maths
from megatron_rl.types import Prompt, Response, RewardResult, Sample

DIGITS = "7" * 5000
"""More digits than Python converts to an integer."""


def sample(label: object, text: str) -> Sample:
    return Sample(Prompt("p:0", (1,), "", label), Response([1], [0.0], "stop", 0), text)


@pytest.mark.parametrize(
    ("label", "answer", "score"),
    [
        (DIGITS, DIGITS, 1.0),
        (DIGITS, "7", 0.0),
        (DIGITS, DIGITS[:-1] + "8", 0.0),
        (10**4000, "1" + "0" * 4000, 1.0),
        (10**4000, "5", 0.0),
        (10**400, "1" + "0" * 400, 1.0),
        (10**400, "1" + "0" * 399 + "1", 0.0),
        (10**400, "10^{400}", 1.0),
        (2**64, "18446744073709551616", 1.0),
        (2**64, "18446744073709551617", 0.0),
        (2**63, "9223372036854775807", 0.0),
        (rf"\frac{{{DIGITS}}}{{3}}", "5", 0.0),
        ("5", DIGITS, 0.0),
        ("5", rf"\frac{{{DIGITS}}}{{{DIGITS}}}", 0.0),
    ],
)
def test_maths(label: object, answer: str, score: float) -> None:
    assert verify_maths(sample(label, rf"\boxed{{{answer}}}")).score == score


@pytest.mark.parametrize("place", range(5))
def test_countdown(place: int) -> None:
    """The attempt `1 + 2 = 3 + 3 = 6` with thousands of digits in one place."""
    numbers = ["1", "2", "3", "3", "6"]
    right = "{} + {} = {} + {} = {} ok"
    assert verify_countdown(sample("1 2 3 > 6", right.format(*numbers))).score == 1.0
    numbers[place] = DIGITS
    found = verify_countdown(sample("1 2 3 > 6", right.format(*numbers)))
    assert (found.score, found.detail) == (0.0, "malformed attempt")


@pytest.mark.parametrize("label", [f"{DIGITS} 2 3 > 6", f"1 2 3 > {DIGITS}", 10**400])
def test_a_countdown_label_with_such_a_number_is_none(label: object) -> None:
    with pytest.raises(ValueError, match="the Countdown label must look like"):
        verify_countdown(sample(label, "1 + 2 = 3 + 3 = 6 ok"))


@pytest.mark.parametrize(
    ("value", "expected", "right"),
    [
        (10**400, 1.5, False),
        (1.5, 10**400, False),
        (10**400, math.inf, False),
        (math.inf, 10**400, False),
        (-(10**400), -math.inf, False),
        (10**400, 10**400, True),
        ([10**400], [1.5], False),
        (math.nan, 1.0, False),
    ],
)
def test_results_of_programs(value: object, expected: object, right: bool) -> None:
    assert passes(Call("f", [], expected), "", value) is right


@pytest.mark.parametrize("label", [f'{{"inputs": [[{DIGITS}]], "outputs": [1], "fn_name": "f"}}', "[" * 100_000])
def test_a_label_of_tests_that_python_cannot_read(label: str) -> None:
    with pytest.raises(ValueError, match="the label is not JSON"):
        read_cases(label)
    assert read_cases(json.dumps({"inputs": [[10**400]], "outputs": [1], "fn_name": "f"})) == [Call("f", [10**400], 1)]


def test_a_result_has_a_score_only_by_its_outcome() -> None:
    assert RewardResult(0.0).has_score
    assert not RewardResult(1.0, outcome="timeout").has_score and not RewardResult(1.0, outcome="error").has_score
