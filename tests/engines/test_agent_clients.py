"""The model's server with the `openai` package, as a program that knows nothing of training uses it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.agent.model import Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.types import AgentResponse, Prompt
from tests.unit.agent.kit import TOOLS, TextEngines, sampling, tokenizer

CALL = '<tool_call>{"name": "f", "arguments": {"x": 3}}</tool_call>'


def test_a_program_with_tools_and_streams_is_one_sequence() -> None:
    openai = pytest.importorskip("openai")  # it comes with the servers
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
