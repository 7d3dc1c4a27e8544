"""The model's server with the `openai` package, as a program that knows nothing of training uses it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest

from examples.agents.openai_agent import solve, solve_in_a_process
from megatron_rl.agent.model import Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.types import AgentResponse, Prompt, RewardResult
from tests.unit.agent.kit import TOOLS, TextEngines, sampling, tokenizer

CALL = '<tool_call>{"name": "f", "arguments": {"x": 3}}</tool_call>'


def test_a_program_with_tools_and_streams_is_one_sequence() -> None:
    import openai  # it comes with the servers

    seen: dict[str, Any] = {}

    async def agent(model: Model, prompt: Prompt) -> float:
        client = openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key)
        history: list[Any] = [{"role": "user", "content": "ab"}]
        create = client.chat.completions.create
        first = await create(model=model.name, messages=history, tools=TOOLS, temperature=0.7, logprobs=True)
        message = first.choices[0].message
        seen["call"] = message.tool_calls[0].function
        assert len(first.choices[0].logprobs.content) == first.usage.completion_tokens
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "9"}
        history += [message.model_dump(), result]
        stream = await create(model=model.name, messages=history, tools=TOOLS, stream=True)
        parts = [chunk.choices[0].delta.content async for chunk in stream]
        seen["text"] = "".join(part for part in parts if part)
        with pytest.raises(openai.NotFoundError, match="there is 'policy' only"):
            await create(model="gpt", messages=history)
        await create(model=model.name, messages=history)
        return 1.0  # never reached: a third turn is refused

    engines = TextEngines(lambda text: "abc" if "tool\n9" in text else CALL)
    with AgentRollouts(AgentSettings(function="own:agent", max_turns=2), agent, engines, tokenizer(), 5000) as rollouts:
        ((response,),) = rollouts.generate([Prompt("p", (1,), "ab", None)], sampling())
    assert (seen["call"].name, seen["call"].arguments, seen["text"]) == ("f", '{"x": 3}', "abc")
    assert isinstance(response, AgentResponse) and response.others == () and response.reward is None
    assert response.finish_reason == "length"


def multiplies(text: str) -> str:
    """A policy that calls the tool of the example, reads the result, and gives it alone when it is asked to."""
    if "number alone" in text:
        return "391"
    if "tool\n391" in text:
        return "The product is 391."
    return '<tool_call>{"name": "multiply", "arguments": {"a": 17, "b": 23}}</tool_call>'


def played(agent: Any, answers: Callable[[str], str], **settings: Any) -> AgentResponse:
    engines = TextEngines(answers, embedded=False)
    prompt = Prompt("p", (1,), "What is 17 * 23?", 391)
    with AgentRollouts(AgentSettings(function="own:agent", **settings), agent, engines, tokenizer(), 5000) as rollouts:
        ((response,),) = rollouts.generate([prompt], sampling())
    assert isinstance(response, AgentResponse)
    return response


@pytest.mark.parametrize("agent", [solve, solve_in_a_process])
def test_the_example_is_one_sequence_of_three_turns(agent: Any) -> None:
    response = played(agent, multiplies)
    assert response.reward is not None and (response.reward.score, response.reward.outcome) == (1.0, "score")
    assert response.others == () and response.turns == 3
    wrong = played(agent, lambda text: "I do not know.")
    assert wrong.reward is not None and wrong.reward.score == 0.0 and wrong.turns == 2


@pytest.mark.parametrize("agent", [solve, solve_in_a_process])
def test_the_example_at_its_limits(agent: Any) -> None:
    """The policy calls the tool again and again; a program in another process cannot say that this is the reason."""
    cut = played(agent, lambda text: multiplies(""), max_turns=3)
    assert cut.turns == 3 and (cut.reward is None if agent is solve else cut.reward == RewardResult(0.0, text=ANY))

    def slow(text: str) -> str:
        time.sleep(0.2)
        return multiplies(text)

    late = played(agent, slow, timeout_seconds=0.05)
    assert late.reward is not None and late.reward.outcome == "timeout"
