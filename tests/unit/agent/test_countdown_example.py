"""The example examples/agents/countdown.py, with a scripted policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from examples.agents.countdown import choose, solve
from megatron_rl.agent.model import Agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.data.countdown.model import CALCULATOR, VOCABULARY, build_tokenizer
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.types import AgentResponse, Prompt, Response, Sample, SamplingParams

TOKENIZER = build_tokenizer((*VOCABULARY, CALCULATOR))


class Script:
    """Engines that answer with the parts of a script, each up to a stop token."""

    embedded = True

    def __init__(self, parts: list[str]) -> None:
        self.parts, self.stops = parts, set[tuple[int, ...]]()

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingParams, partial: object = None) -> list[int]:
        self.stops.add(sampling.stop_token_ids)
        return [0]

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        return set(ids)

    def take(self, request: int) -> list[Response]:
        ids = TOKENIZER.encode(self.parts.pop(0), add_special_tokens=False)
        return [Response(ids, [-1.0] * len(ids), "stop", 0)]

    def abort(self, ids: Iterable[int]) -> None:
        pass

    def cancel(self, ids: Iterable[int]) -> None:
        pass


def played(*parts: str, agent: Agent = solve) -> tuple[AgentResponse, str, set[tuple[int, ...]]]:
    engines = Script(list(parts))
    prompt = Prompt("p", tuple(TOKENIZER.encode("3 5 2 > 16 :")), "3 5 2 > 16 :", "3 5 2 > 16")
    sampling = SamplingParams(1, 46, 1.0, (TOKENIZER.eos_token_id,), 0)
    with AgentRollouts(AgentSettings(function="own:solve"), agent, engines, TOKENIZER, 64) as rollouts:
        ((response,),) = rollouts.generate([prompt], sampling)
    assert isinstance(response, AgentResponse) and response.reward is None and engines.parts == []
    text = TOKENIZER.decode(response.token_ids.tolist(), skip_special_tokens=True)
    return response, verify_countdown(Sample(prompt, response, text)).detail, engines.stops


def test_the_calculator_writes_the_results() -> None:
    response, verdict, stops = played("3 + 5 =", "* 2 =", "ok <eos>")
    words = TOKENIZER.convert_ids_to_tokens(response.token_ids.tolist())
    assert words == ["3", "+", "5", "=", "8", "*", "2", "=", "16", "ok", "<eos>"]
    assert [word for word, sampled in zip(words, response.sampled_mask, strict=True) if not sampled] == ["8", "16"]
    assert verdict == "correct"
    assert stops == {(TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("="))}


def test_the_policy_chooses_what_the_calculator_computes() -> None:
    response, verdict, _ = played("3 + 5 = 8 * 2 calc", "ok <eos>", agent=choose)
    words = TOKENIZER.convert_ids_to_tokens(response.token_ids.tolist())
    assert words == ["3", "+", "5", "=", "8", "*", "2", "calc", "16", "ok", "<eos>"]
    assert [word for word, sampled in zip(words, response.sampled_mask, strict=True) if not sampled] == ["16"]
    assert verdict == "correct" and (response.tool_calls, response.tool_errors) == (1, 0)
    response, verdict, _ = played("3 + calc", agent=choose)
    assert verdict != "correct" and (response.tool_calls, response.tool_errors) == (1, 1)


@pytest.mark.parametrize("part", ["80 * 80 =", "ok + =", "=", "2 - 5 ="])
def test_a_calculation_without_a_result_ends_the_response(part: str) -> None:
    response, verdict, _ = played(part)
    assert response.sampled_mask.all() and verdict != "correct"
