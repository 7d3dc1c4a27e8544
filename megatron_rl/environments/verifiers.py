"""verifiers (0.4): its tasksets as prompts, and its environments as agents.

A rollout is an episode of verifiers. Its program calls verifiers' interception server, whose OpenAI client calls the
rollout's session, so that every token is recorded; the reward is that of the episode.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from megatron_rl.agent.model import Model
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.environments.library import EnvironmentFailed, library
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, RewardResult

PACKAGE = "verifiers"
CHAT = "megatron-rl-chat"
"""verifiers' name of the harness in `verifiers_chat.py`."""
UNNAMED = "(the environment opens the conversation)"
"""Text of a prompt whose task has none."""


def tasks(name: str, settings: TaskSettings, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each task of a taskset, in an order that the seed decides.

    `settings.settings` is the section `env` of verifiers; whether tasks are held out is for its `taskset` to say.
    Raises UserError for a taskset that cannot be loaded.
    """
    environment = json.dumps({"name": name, "settings": settings.settings})
    try:
        taskset = _verifiers().load_taskset(_config(name, settings.settings).taskset)
        chosen = taskset.shuffle(settings.seed) if taskset.bounded else taskset
        for task in chosen.take(settings.size):
            yield {
                "prompt": task.data.prompt_text or UNNAMED,
                "problem": task.data.model_dump_json(exclude={"idx"}),
                "task": task.data.model_dump_json(),
                "environment": environment,
            }
    except UserError:
        raise
    except Exception as error:  # a taskset is a program of its author and may raise anything
        raise UserError(f"verifiers cannot load its tasks: {type(error).__name__}: {error}") from error


class VerifiersAgent:
    """Plays the task of a prompt that `tasks` made."""

    def __init__(self, url: str = "") -> None:
        """Raises UserError if verifiers is not installed."""
        _verifiers()

    async def __call__(self, model: Model, prompt: Prompt) -> RewardResult | None:
        """Returns the reward of the episode: the mean over the traces that are trained, if several agents play.

        None if the rollout has reached a limit of the run and the environment does not take that as an end. Raises
        EnvironmentFailed if the episode has failed, or has no reward.
        """
        vf = _verifiers()
        given = json.loads(prompt.metadata["environment"])
        env = vf.load_environment(_config(given["name"], given["settings"]))
        kind = type(env.taskset).task_type()
        task = kind(kind.data_type().model_validate_json(prompt.metadata["task"]), env.config.taskset.task)
        variable = f"ROLLOUT_API_KEY_{model.session.id}"  # verifiers reads keys from the environment only
        client = vf.EvalClientConfig(base_url=model.base_url, api_key_var=variable)
        os.environ[variable] = model.api_key
        try:
            async with env.serving():
                episode = await env.run_episode(task, vf.ModelContext(model=model.name, client=client))
        finally:
            del os.environ[variable]
        if episode.ok:
            return _reward(episode, model)
        if model.session.limit_reached:
            return None
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise EnvironmentFailed("; ".join(f"{error.type}: {error.message}" for error in errors) or "the episode failed")


def _reward(episode: Any, model: Model) -> RewardResult:
    for trace in episode.traces:
        if not trace.agent.trainable and trace.agent.config.client.base_url == model.base_url:
            raise EnvironmentFailed(
                f"the role {trace.agent.name!r} is not trained, but asks the policy in training: give it a model and a "
                f"client of its own, in tasks.settings.{trace.agent.name}"
            )
    trained = [trace for trace in episode.traces if trace.agent.trainable]
    if not trained or any(not any(trace.rewards.values()) for trace in trained):
        raise EnvironmentFailed("the environment gave no reward")
    parts = [f"{name} {part.score:g}" for trace in trained for name, part in trace.rewards.items() if part is not None]
    return RewardResult(sum(trace.reward for trace in trained) / len(trained), detail=", ".join(parts))


def _config(name: str, settings: dict[str, Any]) -> Any:
    """Returns verifiers' configuration of an environment.

    Where nothing else is said, programs run on this machine rather than in a remote sandbox, and those that only chat
    run in this process. Raises UserError for an environment or a setting that verifiers does not know.
    """
    vf = _verifiers()
    taskset = settings.get("taskset", {})
    if not isinstance(taskset, dict) or "id" in taskset:
        raise UserError("tasks.settings.taskset: a section without id is expected; data names the environment")
    try:
        config = vf.resolve_env_config({**settings, "taskset": {**taskset, "id": name}})
        own_program = vf.default_harness_id(name) != "bash"
        roles = {role: agent for role, agent in config if isinstance(agent, vf.AgentConfig)}
        return config.model_copy(update={role: _at_home(agent, own_program) for role, agent in roles.items()})
    except Exception as error:  # an import of the environment's module may raise anything
        raise UserError(f"verifiers does not load it: {type(error).__name__}: {error}") from error


def _at_home(agent: Any, own_program: bool) -> Any:
    vf = _verifiers()
    if "runtime" not in agent.model_fields_set:
        agent = agent.model_copy(update={"runtime": vf.SubprocessConfig()})
    chats = not own_program if agent.harness is None else agent.harness.id == "null"
    if chats and agent.runtime.type == "subprocess":
        harness = vf.harness_config_type(CHAT)(id=CHAT)
        agent = agent.model_copy(update={"harness": harness})
    return agent


def _verifiers() -> Any:
    """Returns `verifiers.v1`, which then finds the harness of this package. Raises UserError if it is not installed."""
    vf = library("verifiers.v1", PACKAGE)
    harnesses = library("verifiers.v1.harnesses", PACKAGE).__name__
    chat = library("megatron_rl.environments.verifiers_chat", PACKAGE)
    sys.modules.setdefault(f"{harnesses}.{CHAT.replace('-', '_')}", chat)  # verifiers looks for harnesses there
    return vf
