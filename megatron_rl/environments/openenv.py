"""OpenEnv (0.10): an agent for any OpenEnv server, through the generic client of its package.

The policy sees the prompt and the first observation; each of its answers is an action, until the environment is done.
The reward is the sum of the rewards of the steps.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from megatron_rl.agent.model import Model
from megatron_rl.agent.session import LimitReached
from megatron_rl.environments.library import EnvironmentFailed, library
from megatron_rl.types import Prompt

PACKAGE = "openenv"
REFUSED = "VALIDATION_ERROR"
"""OpenEnv's code for an action that is not of the environment's form."""


class OpenEnvAgent:
    """Plays an environment of the server at a URL. A prompt's column `reset`, if there is one, has the arguments of the
    environment's reset, such as a seed."""

    def __init__(self, url: str) -> None:
        """Raises UserError if openenv is not installed."""
        library("openenv.core", PACKAGE)
        self.url = url

    async def __call__(self, model: Model, prompt: Prompt) -> float:
        """Returns the sum of the rewards, also of an environment that a limit of the run has ended before it was done.

        Raises LimitReached if there was no reward until then, and EnvironmentFailed for an environment that is done and
        gave none. Errors of the connection and of the server pass.
        """
        client = library("openenv.core", PACKAGE).GenericEnvClient(base_url=self.url)
        rewards: list[float] = []
        field = await self._only_field()
        async with client as env:
            state = await env.reset(**(prompt.metadata.get("reset") or {}))
            messages = [{"role": "user", "content": f"{prompt.text}\n\n{_text(state.observation)}".strip()}]
            while not state.done:
                try:
                    messages.append(answer := await model.chat(messages))
                except LimitReached:
                    if rewards:
                        break
                    raise
                try:
                    state = await env.step(_action(answer["content"], field))
                except (ValueError, RuntimeError) as error:
                    if isinstance(error, RuntimeError) and REFUSED not in str(error):
                        raise
                    messages.append({"role": "user", "content": f"error: {error}"})
                    continue
                if state.reward is not None:
                    rewards.append(float(state.reward))
                messages.append({"role": "user", "content": _text(state.observation)})
        if not rewards:
            raise EnvironmentFailed("the environment gave no reward")
        return sum(rewards)

    async def _only_field(self) -> str | None:
        """Returns the name of the text that an action is; None if an action has other or several required fields."""
        async with (
            aiohttp.ClientSession(raise_for_status=True) as http,
            http.get(f"{self.url.rstrip('/')}/schema") as response,
        ):
            schema = (await response.json())["action"]
        required = schema.get("required", [])
        only = required[0] if len(required) == 1 else None
        return only if only and schema["properties"][only].get("type") == "string" else None


def _action(text: str, field: str | None) -> dict[str, Any]:
    """Returns the action that an answer is. Raises ValueError for an answer that should be JSON and is not."""
    if field is not None:
        return {field: text}
    action = json.loads(text)
    if not isinstance(action, dict):
        raise ValueError("the action must be a JSON object")
    return action


def _text(observation: Any) -> str:
    """Returns an observation as the policy sees it: its text, if it is nothing else, otherwise JSON."""
    shown = {key: value for key, value in observation.items() if value not in (None, "", {}, [])}
    values = list(shown.values())
    return values[0] if len(values) == 1 and isinstance(values[0], str) else json.dumps(shown, ensure_ascii=False)
