"""The adapter of Harbor, with stand-ins for Harbor's classes. No trial was ever run: it needs a container runtime.

By hand, harbor 0.26.0 (Python 3.12) accepted the configuration, and its agent terminus-2 got URL and key from it.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.agent.resolve import load_agent
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.environments.harbor import tasks
from megatron_rl.errors import UserError
from megatron_rl.types import AgentResponse, Prompt, RewardResult
from tests.unit.agent.kit import TextEngines, sampling, tokenizer


class TrialConfig(types.SimpleNamespace):
    @classmethod
    def model_validate(cls, tree: dict[str, Any]) -> TrialConfig:
        if "colour" in tree:
            raise ValueError("colour: extra inputs are not permitted")
        return cls(**tree)


class Trial:
    """Asks the policy with the `openai` settings that the agent's configuration has, as an agent of Harbor does."""

    rewards: dict[str, float] | None
    failures: tuple[str, ...]

    def __init__(self, config: TrialConfig) -> None:
        self.config = config

    @classmethod
    async def create(cls, config: TrialConfig) -> Trial:
        return cls(config)

    async def run(self) -> Any:
        import aiohttp

        agent = self.config.agent
        assert agent["model_name"] == "openai/policy" and self.config.trials_dir.is_dir()
        headers = {"Authorization": f"Bearer {agent['env'][agent['model_api_key_name']]}"}
        text = (self.config.task["path"] / "instruction.md").read_text()
        body = {"model": "policy", "messages": [{"role": "user", "content": text}]}
        async with aiohttp.ClientSession(raise_for_status=True) as http:
            await http.post(f"{agent['base_url']}/chat/completions", json=body, headers=headers)
        verified = types.SimpleNamespace(rewards=self.rewards) if self.rewards is not None else None
        failures = [
            types.SimpleNamespace(exception_type="SandboxError", exception_message=one) for one in self.failures
        ]
        return types.SimpleNamespace(verifier_result=verified, recorded_exceptions=lambda: failures)


@pytest.fixture(autouse=True)
def harbor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (
        ("harbor", {}),
        ("harbor.models.trial.config", {"TrialConfig": TrialConfig}),
        ("harbor.trial.trial", {"Trial": Trial}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "instruction.md").write_text(f"Do the {name} thing.")
    (tmp_path / "notes").mkdir()
    return tmp_path


def rows(folder: Path, size: int = 9, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    return list(tasks(str(folder), TaskSettings(size=size, seed=seed, settings=settings), False))


def played(row: dict[str, Any], rewards: dict[str, float] | None, *failures: str) -> tuple[AgentResponse, RewardResult]:
    Trial.rewards, Trial.failures = rewards, failures
    settings = AgentSettings(function="harbor", timeout_seconds=30)
    prompt = Prompt("p", (1,), row["prompt"], None, row)
    with AgentRollouts(settings, load_agent(settings), TextEngines(lambda text: "ok"), tokenizer(), 9000) as rollouts:
        ((response,),) = rollouts.generate([prompt], sampling())
    assert isinstance(response, AgentResponse) and response.reward is not None
    return response, response.reward


def test_a_folder_of_tasks_is_a_data_set(folder: Path) -> None:
    found = rows(folder, environment={"type": "docker"})
    assert sorted(row["prompt"] for row in found) == [f"Do the {name} thing." for name in ("first", "second", "third")]
    assert found == rows(folder, environment={"type": "docker"}) and len(rows(folder, size=2)) == 2
    assert len({tuple(row["prompt"] for row in rows(folder, seed=seed)) for seed in range(9)}) > 1
    with pytest.raises(UserError, match="no tasks of Harbor"):
        rows(folder / "notes")
    with pytest.raises(UserError, match="Harbor refuses them: colour"):
        rows(folder, colour="red")
    with pytest.raises(UserError, match=r"tasks\.settings\.agent: 'mini', but a section is expected"):
        rows(folder, agent="mini")
    (folder / "second" / "instruction.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"second/instruction.md cannot be read: .*utf-8"):
        rows(folder)


def test_a_trial_samples_from_the_policy_and_gives_the_reward(folder: Path) -> None:
    row = rows(folder, size=1, agent={"name": "mini"})[0]
    assert json.loads(row["environment"]) == {"agent": {"name": "mini"}}
    response, reward = played(row, {"reward": 0.5, "speed": 2})
    assert (reward.score, reward.detail) == (0.5, "reward 0.5, speed 2")
    assert row["prompt"] in tokenizer().decode(response.context)
    assert tokenizer().decode(response.token_ids) == "ok<|im_end|>"
    assert played(row, {"tests": 1})[1].score == 1.0


@pytest.mark.parametrize(
    ("rewards", "failures", "message"),
    [
        (None, (), "the verifier gave no reward"),
        ({"reward": 1.0}, ("the container died",), "SandboxError: the container died"),
        ({"a": 1, "b": 2}, (), "none of them named 'reward'"),
    ],
)
def test_a_trial_that_fails_has_no_reward(
    folder: Path, rewards: dict[str, float] | None, failures: tuple[str, ...], message: str
) -> None:
    _, reward = played(rows(folder, size=1)[0], rewards, *failures)
    assert reward.outcome == "error" and message in reward.detail
