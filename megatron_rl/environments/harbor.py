"""Harbor (0.26): folders of tasks as prompts, and its trials as rollouts.

A trial needs what its environment asks for, such as Docker, and an agent of Harbor that calls the policy by URL. Set
`rollout.agent.host` to an address that the containers reach, if the agent runs inside them.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.agent.model import Model
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.environments.library import EnvironmentFailed, library
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, RewardResult

PACKAGE = "harbor"
INSTRUCTION = "instruction.md"
AGENT = {"name": "terminus-2"}
"""Harbor's agent, unless the settings name another."""
REWARD = "reward"
"""The reward of a trial that has several."""


def tasks(name: str, settings: TaskSettings, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yields a row for each task of a folder, in an order that the seed decides. `settings.settings` are those of
    Harbor's TrialConfig. Raises UserError for a folder without tasks, and settings that Harbor refuses."""
    folders = sorted(path.parent.resolve() for path in Path(name).expanduser().glob(f"*/{INSTRUCTION}"))
    if not folders:
        raise UserError(f"the folder has no tasks of Harbor (<task>/{INSTRUCTION}), or is not there")
    random.Random(settings.seed).shuffle(folders)
    _trial_config(folders[0], settings.settings, {}, Path())
    for folder in folders[: settings.size]:
        try:
            text = (folder / INSTRUCTION).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / INSTRUCTION} cannot be read: {error}") from error
        yield {"prompt": text, "task": str(folder), "environment": json.dumps(settings.settings)}


class HarborAgent:
    """Runs the trial of a prompt that `tasks` made."""

    def __init__(self, url: str = "") -> None:
        """Raises UserError if harbor is not installed."""
        library(PACKAGE, PACKAGE)

    async def __call__(self, model: Model, prompt: Prompt) -> RewardResult | None:
        """Returns the reward that Harbor's verifier found; None if the trial has failed after the rollout has reached a
        limit of the run. Raises EnvironmentFailed if the trial has failed or has no reward."""
        settings = json.loads(prompt.metadata["environment"])
        policy = {
            "model_name": f"openai/{model.name}",
            "base_url": model.base_url,
            "model_api_key_name": "OPENAI_API_KEY",
            "env": {"OPENAI_API_KEY": model.api_key},
        }
        with tempfile.TemporaryDirectory(prefix="harbor-") as folder:
            config = _trial_config(Path(prompt.metadata["task"]), settings, policy, Path(folder))
            trial = await library("harbor.trial.trial", PACKAGE).Trial.create(config)
            result = await trial.run()
        rewards = (result.verifier_result.rewards if result.verifier_result else None) or {}
        failures = [f"{one.exception_type}: {one.exception_message}" for one in result.recorded_exceptions()]
        if failures and model.session.limit_reached:
            return None
        if failures or not rewards:
            raise EnvironmentFailed("; ".join(failures) or "the verifier gave no reward")
        detail = ", ".join(f"{key} {value:g}" for key, value in rewards.items())
        return RewardResult(float(_chosen(rewards)), detail=detail)


def _chosen(rewards: dict[str, float]) -> float:
    """Returns the reward to train on. Raises EnvironmentFailed if there are several and none is `reward`."""
    if len(rewards) > 1 and REWARD not in rewards:
        raise EnvironmentFailed(f"the verifier gave {', '.join(rewards)}, none of them named {REWARD!r}")
    return rewards.get(REWARD, next(iter(rewards.values())))


def _trial_config(task: Path, settings: dict[str, Any], policy: dict[str, Any], folder: Path) -> Any:
    """Returns Harbor's TrialConfig. Raises UserError for settings that Harbor refuses."""
    config = library("harbor.models.trial.config", PACKAGE).TrialConfig
    chosen = settings.get("agent", {})
    if not isinstance(chosen, dict):
        raise UserError(f"tasks.settings.agent: {chosen!r}, but a section is expected, such as {{name: terminus-2}}")
    agent = AGENT | chosen | policy
    try:
        return config.model_validate(settings | {"task": {"path": task}, "agent": agent, "trials_dir": folder})
    except ValueError as error:
        raise UserError(f"tasks.settings: Harbor refuses them: {error}") from error
