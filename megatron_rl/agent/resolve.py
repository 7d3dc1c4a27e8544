"""Lookup of the agent that the configuration names."""

from __future__ import annotations

import inspect
from typing import Any

from megatron_rl.agent.model import Agent
from megatron_rl.config.agent import ENVIRONMENTS, AgentSettings
from megatron_rl.errors import UserError
from megatron_rl.utils.import_path import import_callable

KEY = "rollout.agent.function"
EXAMPLE = """\
    async def solve(model, prompt):  # megatron_rl.agent.model.Model, megatron_rl.types.Prompt
        answer = await model.chat([{"role": "user", "content": prompt.text}])
        return float(answer["content"].strip() == prompt.label)"""


def load_agent(settings: AgentSettings) -> Agent:
    """Returns the agent's function, or the agent of a library of environments. Raises UserError if it cannot be
    imported, or is no agent."""
    if settings.library in ENVIRONMENTS:
        agent: Agent = import_callable(ENVIRONMENTS[settings.library], KEY)(settings.function.partition(":")[2])
        return agent
    function: Agent = import_callable(settings.function, KEY)
    if problem := _problem(function):
        raise UserError(
            f"{KEY}={settings.function!r}: {problem}. An agent is an async function of a model and a "
            f"prompt:\n\n{EXAMPLE}"
        )
    return function


def _problem(function: Any) -> str | None:
    if not any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        return "it is not an async function"
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        return f"it cannot be called with a model and a prompt: {error}"
    return None
