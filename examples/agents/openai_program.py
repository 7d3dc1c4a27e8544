"""A program that knows nothing of training: it answers a question with the `openai` package and a calculator.

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python openai_program.py MODEL "What is 17 * 23?"

`openai_agent.py` beside it gives this program to a run, as it is.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


def multiply(arguments: str) -> str:
    """Returns the product as text, or what is wrong with the arguments."""
    try:
        numbers = json.loads(arguments)
        return str(numbers["a"] * numbers["b"])
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error}"


async def answer(client: AsyncOpenAI, model: str, question: str) -> str:
    """Asks, multiplies for as long as the model wants it, and returns the final answer, which arrives as a stream."""
    messages: list[Any] = [{"role": "user", "content": question}]
    tools: list[Any] = [CALCULATOR]
    while True:
        completion = await client.chat.completions.create(model=model, messages=messages, tools=tools)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            assert call.type == "function"
            known = call.function.name == "multiply"
            result = multiply(call.function.arguments) if known else f"error: there is no {call.function.name}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    messages.append({"role": "user", "content": "Give the number alone."})
    stream = await client.chat.completions.create(model=model, messages=messages, tools=tools, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return "".join(parts).strip()


async def main() -> None:
    model, question = sys.argv[1:]
    async with AsyncOpenAI() as client:
        print(await answer(client, model, question))


if __name__ == "__main__":
    asyncio.run(main())
