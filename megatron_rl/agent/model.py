"""The model as an agent function gets it: in process, or by URL for any client of the OpenAI chat format."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.agent.messages import MALFORMED, Message, well_formed
from megatron_rl.agent.session import Answer, Session
from megatron_rl.types import Prompt, RewardResult

Tool = Callable[..., Any]
"""A function with typed arguments and a docstring in Google's form, which the model reads. It may be async."""


@dataclass(frozen=True, slots=True)
class Model:
    """The policy in training, for one rollout."""

    session: Session
    base_url: str
    """URL for OpenAI clients: `OpenAI(base_url=model.base_url, api_key=model.api_key)`."""
    name: str
    """Name of the model in requests."""

    @property
    def api_key(self) -> str:
        """Key of this rollout only."""
        return self.session.key

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer."""
        return self.session.tokenizer

    async def chat(
        self,
        messages: list[Message],
        *,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Message:
        """Returns the model's answer to the messages, as a message to append to them. `stop`: a text or texts that end
        the answer. Raises LimitReached."""
        schemas = [schema_of(tool) for tool in tools]
        answer = await self.session.chat(messages, tools=schemas, max_tokens=max_tokens, stop=stop)
        assert answer.message is not None
        return answer.message

    async def generate(
        self, token_ids: Sequence[int], *, max_tokens: int | None = None, stop: str | Sequence[str] = ()
    ) -> Answer:
        """Returns what the model writes after these tokens. To go on, give them back followed by the answer's
        `response.token_ids` and your own. Raises LimitReached, and ValueError for what is no token id."""
        return await self.session.generate(token_ids, max_tokens=max_tokens, stop=stop)

    async def use_tools(
        self, messages: list[Message], tools: Sequence[Tool], *, max_tokens: int | None = None
    ) -> Message:
        """Chats, and answers tool calls, until the model makes none. Appends everything to the messages, and returns
        the last answer. Raises LimitReached."""
        while True:
            answer = await self.chat(messages, tools=tools, max_tokens=max_tokens)
            messages.append(answer)
            if not (calls := answer.get("tool_calls")):
                return answer
            for call in calls:
                result = self.session.tool_result(await call_tool(tools, call))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    async def use_tool(self, tool: Tool, **arguments: Any) -> str:
        """Runs a tool that the policy has called in a way of its own, without `use_tools`, and counts the call. Returns
        the result as text; what the tool raises is a text too."""
        self.session.tool_calls += 1
        return self.session.tool_result(await _called(tool, arguments))


Agent = Callable[[Model, Prompt], Awaitable[RewardResult | float | None]]


def schema_of(tool: Tool) -> dict[str, Any]:
    """Returns the JSON schema of a tool for chat templates. Raises ValueError or TypeError for a tool without types or
    docstring."""
    from transformers.utils import get_json_schema

    schema: dict[str, Any] = get_json_schema(tool)
    return schema


async def call_tool(tools: Sequence[Tool], call: Message) -> str:
    """Returns the result of a tool call as text. What the model did wrong, and what the tool raises, is a text too."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name == MALFORMED:
        return f"error: the tool call is not JSON of an object with a name and an object of arguments: {arguments}"
    tool = next((tool for tool in tools if tool.__name__ == name), None)
    if tool is None:
        return f"error: there is no tool {name!r}; there are {', '.join(tool.__name__ for tool in tools)}"
    try:
        values = json.loads(arguments)
        inspect.signature(tool).bind(**values)
    except (TypeError, ValueError) as error:
        return f"error: wrong arguments for {name}: {error}"
    return await _called(tool, values)


async def _called(tool: Tool, values: dict[str, Any]) -> str:
    try:
        result = tool(**values)
        return well_formed(str(await result if inspect.isawaitable(result) else result))
    except Exception as error:  # the model learns from the errors of its tools
        return well_formed(f"error: {type(error).__name__}: {error}")
