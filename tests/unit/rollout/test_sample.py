from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_rl.rollout.sample import collect
from megatron_rl.types import Generation, Prompt, SamplingParams

SAMPLING = SamplingParams(n=2, max_tokens=4, temperature=1.0, stop_token_ids=(0,), seed=0)
PROMPTS = [Prompt(id=f"p:{i}", token_ids=(i,), text=str(i), label=None) for i in range(3)]


class Engine:
    def __init__(self, responses: int) -> None:
        self.responses = responses

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Generation]]:
        return [
            [Generation([*prompt.token_ids, k], [-1.0, -2.0], "stop", 5) for k in range(self.responses)]
            for prompt in prompts
        ]


class Tokenizer:
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "-".join(map(str, token_ids))


TOKENIZER: Any = Tokenizer()


def test_samples_come_group_after_group() -> None:
    samples = collect(Engine(2), PROMPTS, SAMPLING, TOKENIZER)
    assert [(s.group, s.prompt.id, s.text) for s in samples] == [
        (i, f"p:{i}", f"{i}-{k}") for i in range(3) for k in range(2)
    ]
    assert all(s.reward is None and s.generation.weight_version == 5 for s in samples)


def test_too_few_responses_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="p:0: 1 responses came back, 2 were asked for"):
        collect(Engine(1), PROMPTS, SAMPLING, TOKENIZER)
