"""Problems with made-up responses, and a source that answers from a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.evaluation import ProtocolSettings
from megatron_rl.evaluation.problems import GradedResponse, Problem
from megatron_rl.types import Outcome, Prompt, Response, Sample, SamplingParams


def response(
    score: float, answer: str | None = None, *, tokens: int = 3, truncated: bool = False, outcome: Outcome = "score"
) -> GradedResponse:
    return GradedResponse(f"text of {answer}", answer, score, "", outcome, tokens, truncated)


def problem(*responses: GradedResponse, name: str = "suite:0") -> Problem:
    return Problem(name, "prompt", "label", list(responses))


class ScriptedSource:
    """Answers every maths problem `a + b` rightly for even a, wrongly for odd, and keeps the requests."""

    identity: dict[str, Any] = {"model": "scripted"}  # noqa: RUF012
    tokenizer = None
    stop = ()
    decode = None
    vocabulary = positions = None

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.samplings: list[SamplingParams] = []

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Sample]:
        self.asked.append([prompt.text for prompt in prompts])
        self.samplings.append(sampling)
        samples = []
        for prompt in prompts:
            first, second = map(int, prompt.text.split("\n")[0].split(" + "))
            for number in range(sampling.n):
                answer = first + second + first % 2 * (1 + number)
                response = Response([-1] * (number + 1), [], "stop" if number < 3 else "length", 0)
                samples.append(Sample(prompt, response, f"\\boxed{{{answer}}}"))
        return samples


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource()


@pytest.fixture
def sums(tmp_path: Path) -> Callable[[str, int], Path]:
    def write(name: str, count: int) -> Path:
        rows = [{"prompt": f"{n} + {n * n}", "label": str(n + n * n)} for n in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def protocol(sums: Callable[[str, int], Path]) -> ProtocolSettings:
    return ProtocolSettings.model_validate(
        {
            "samples_per_prompt": 2,
            "temperature": 1.0,
            "reward": {"name": "math", "workers": 1},
            "suites": {
                "seven": str(sums("seven.jsonl", 7)),
                "four": {"data": str(sums("four.jsonl", 4)), "samples_per_prompt": 4, "temperature": 0.5},
            },
        }
    )
