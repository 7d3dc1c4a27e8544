"""Two agents around an unmodified program (openai_program.py): in the run's process, and in a process of its own.

    rollout.agent.function: examples.agents.openai_agent:solve    # or :solve_in_a_process
    reward.name: agent

They need the `openai` package, and a policy with a chat template that writes tool calls as Hermes and Qwen do.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from megatron_rl.agent.model import Model
from megatron_rl.types import Prompt

PROGRAM = Path(__file__).with_name("openai_program.py")


async def solve(model: Model, prompt: Prompt) -> float:
    """Calls the program's function with a client of this rollout."""
    from openai import AsyncOpenAI

    from examples.agents.openai_program import answer

    async with AsyncOpenAI(base_url=model.base_url, api_key=model.api_key) as client:
        return float(await answer(client, model.name, prompt.text) == str(prompt.label))


async def solve_in_a_process(model: Model, prompt: Prompt) -> float:
    """Runs the program, and ends it with the rollout. It gets the URL and the key as any program of OpenAI's does."""
    environment = os.environ | {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": model.api_key}
    command = (sys.executable, str(PROGRAM), model.name, prompt.text)
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if model.session.limit_reached:
        return 0.0  # the program got an error that says so
    if process.returncode:
        raise RuntimeError(f"the program ended with status {process.returncode}")
    return float(output.decode().strip() == str(prompt.label))
