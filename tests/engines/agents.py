"""An agent of the tests that knows the model by its URL only."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from megatron_rl.agent.model import Model
from megatron_rl.types import Prompt

TEMPLATE = "{{ bos_token + ' ' }}{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
"""Chat template for the words of Countdown."""


async def two_turns(model: Model, prompt: Prompt) -> None:
    """Answers twice, the second time in a stream, and leaves a call behind that nobody waits for."""
    # To make a client takes long, and all rollouts begin at once: by default a connection may take 5 s only.
    client = AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, max_retries=0, timeout=600.0)
    question = prompt.text.removeprefix("<bos> ")  # control tokens come from the template alone
    messages: list[Any] = [{"role": "user", "content": question}]
    create = client.chat.completions.create
    first = await create(model=model.name, messages=messages, max_completion_tokens=9, n=1, temperature=0.3)
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "so ok"}]
    stream = await create(model=model.name, messages=messages, max_completion_tokens=20, stream=True)
    async for chunk in stream:
        assert chunk.model == model.name
    left_behind.add(asyncio.create_task(create(model=model.name, messages=[{"role": "user", "content": "wait"}])))


left_behind: set[asyncio.Task[Any]] = set()
"""A task that nobody holds may vanish."""
