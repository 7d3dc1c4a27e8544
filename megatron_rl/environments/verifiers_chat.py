"""A harness of verifiers: a chat with tools, in this process.

verifiers' own chat program (`null`) is a process for each rollout, for which it installs packages at its first use.
This one does the same as a coroutine, so that a thousand rollouts need neither.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

from openai import APIStatusError, AsyncOpenAI, DefaultAsyncHttpxClient, omit
from verifiers.v1 import HarnessError, ModelContext, ProgramResult, Runtime, TaskData, Trace
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.null import NullHarness
from verifiers.v1.harnesses.utils.compaction import is_context_overflow
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["ChatHarness"]


class ChatHarness(NullHarness):
    """Answers the task's prompt, and calls its tools, until the policy calls none or has reached a limit."""

    SUPPORTS_TOOL_INTERCEPTION = False

    async def setup(self, runtime: Runtime) -> None:
        """Installs nothing."""

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
        tool_interception_url: str | None = None,
    ) -> ProgramResult:
        """Raises HarnessError if the model refuses a request for another reason than a limit."""
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        # The endpoint is a plain http:// of this machine: reading certificates would be most of a short rollout's cost.
        http = DefaultAsyncHttpxClient(verify=False, timeout=None)
        # No retries: a request that is sent twice is sampled twice.
        async with (
            AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, http_client=http) as client,
            AsyncExitStack() as stack,
        ):
            tools, places, connections = await connect_mcp({"mcpServers": servers}, stack)
            try:
                while True:
                    asked: Any = {"model": ctx.model, "messages": messages, "tools": tools or omit}
                    answer = (await client.chat.completions.create(**asked)).choices[0].message
                    messages.append(answer.model_dump(exclude_none=True))
                    if not answer.tool_calls:
                        break
                    for call in answer.tool_calls:
                        result = await _result(call, places, connections)
                        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            except APIStatusError as error:
                if not is_context_overflow(error):
                    raise HarnessError(str(error)) from error
        return ProgramResult(0, "", "")


async def _result(call: Any, places: dict[str, Any], connections: dict[str, Any]) -> Any:
    """Returns the result of a tool call. What the policy did wrong is a text that it sees."""
    name = call.function.name
    if name not in places:
        return f"error: there is no tool {name!r}; there are {', '.join(places)}"
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError as error:
        return f"error: the arguments of {name} are not JSON: {error}"
    if not isinstance(arguments, dict):
        return f"error: the arguments of {name} are not an object"
    return await call_mcp(connections, places, name, arguments)
