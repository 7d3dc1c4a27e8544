"""Grading of a step's responses: a failed generation or verifier gives no reward, whatever scores are around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pytest

from megatron_rl.config.reward import FormatSettings, RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward.grading import Grading, generation_fault
from megatron_rl.types import Prompt, Response, RewardResult, Sample

PROMPT = Prompt("p:0", (1,), "", "4")
NAN = float("nan")
GOOD = Response([5, 6], [-0.5, -0.1], "stop", 0)
WITH_TOOL = Response([5, 8, 6], [-0.5, NAN, -0.1], "stop", 0, sampled_mask=[True, False, True])
FAILED = {
    "no token": Response([], [], "stop", 0),
    "no sampled token": Response([8, 8], [0.0, 0.0], "length", 0, sampled_mask=[False, False]),
    "not a number": Response([5, 6], [-0.5, NAN], "stop", 0),
    "not a number after a tool": Response([8, 6], [0.0, NAN], "stop", 0, sampled_mask=[False, True]),
}


class Generous:
    """Gives every sample a score of 1."""

    def score(self, samples: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(1.0, "4", "correct", text="<a>") for _ in samples]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def grading(**settings: Any) -> Grading:
    return Grading(Generous(), RewardSettings(name="mine:score", **settings))


@pytest.mark.parametrize("name", FAILED)
def test_a_failed_generation_has_no_reward(name: str) -> None:
    good, failed, again = grading().grade([(PROMPT, GOOD), (PROMPT, FAILED[name]), (PROMPT, WITH_TOOL)])
    assert good == again == RewardResult(1.0, "4", "correct", text="<a>")
    assert not failed.has_score and failed.outcome == "error" and failed.text == "<a>"
    assert failed.detail.startswith("the generation failed: ")


def test_a_response_without_log_probs_may_be_fine() -> None:
    assert generation_fault(Response([5], [], "stop", 0)) == ""
    assert "token 6" in generation_fault(FAILED["not a number after a tool"])
    assert generation_fault(Response([5], [-np.inf], "stop", 0)) == "", "a token may be as rare as floats can say"


def test_failed_generations_are_counted_and_end_the_run_beyond_the_limit() -> None:
    graded = [(PROMPT, result) for result in grading().grade([(PROMPT, GOOD)] * 3 + [(PROMPT, FAILED["no token"])])]
    assert grading(max_failed_fraction=0.25).check(graded)["reward/error_fraction"] == 0.25
    with pytest.raises(UserError, match=r"1 of 4 samples .* have no reward; .*\n.*the generation failed"):
        grading(max_failed_fraction=0.2).check(graded)


def test_only_results_with_a_score_are_shaped() -> None:
    found = grading(format=FormatSettings(tags=["<b>"], penalty=0.25)).shaped([RewardResult(1.0), RewardResult(0.5)])
    assert found == [0.75, 0.25]
