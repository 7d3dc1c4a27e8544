"""Whole runs of two steps on environments: prompts, rollouts, rewards and updates, with a tiny model on the CPU."""

from __future__ import annotations

import shutil
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from examples.environments import tiny
from megatron_rl.rollout.dump import dumps
from tests.e2e_cpu.conftest import REPOSITORY, CommandLine, Finished, values
from tests.environments.conftest import MODULES
from tests.hf_models import write_hf_model
from tests.tiers import slow
from tests.unit.agent.kit import tokenizer

pytest.importorskip("verifiers.v1")
pytest.importorskip("reasoning_gym")
pytestmark = [pytest.mark.environments, pytest.mark.e2e]

STEPS, EXAMPLES = 2, REPOSITORY / "examples/environments"
COMMON: dict[str, Any] = {
    "model": {"path": "model"},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 24},
    "algorithm": {"name": "grpo"},
    "actor": {"device": "cpu", "tensor_parallel": 1, "dtype": "float32", "optimizer": {"lr": 1e-3}},
    "train": {"steps": STEPS},
    "evaluation": {"every": 0, "samples_per_prompt": 1},
    "observability": {"rollouts_every": 1, "view": "plain"},
}


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A folder with a tiny model that has a chat template, and the tests' own environment."""
    folder = tmp_path_factory.mktemp("environments")
    write_hf_model(folder / "model", vocab_size=len(tokenizer()), max_position_embeddings=2048)
    tokenizer().save_pretrained(folder / "model")
    shutil.copy(MODULES / "played.py", folder)
    return CommandLine(folder)


def train(command_line: CommandLine, name: str, **sections: Any) -> Finished:
    tree = {key: COMMON.get(key, {}) | sections.get(key, {}) for key in {**COMMON, **sections}}
    config = command_line.folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    run = command_line.train(name, config=config)
    assert run.status == 0, run.output[-5000:]
    assert len(values(run, "train/loss")) == STEPS
    assert max(values(run, "logprob/rollout_actor_max_diff")) < 1e-3
    return run


def rows_of(run: Finished) -> list[dict[str, Any]]:
    return [row for _, path in dumps(run.folder / "rollouts") for row in pq.read_table(path).to_pylist()]


def test_a_task_of_reasoning_gym_trains(command_line: CommandLine) -> None:
    few = {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}
    run = train(
        command_line,
        "sums",
        data={"train": "reasoning-gym:chain_sum", "tasks": {"size": 40, "seed": 1, "settings": few}},
        reward={"name": "reasoning-gym", "timeout_seconds": 60},
        evaluation={"suites": {"sums": {"data": "reasoning-gym:chain_sum", "tasks": {"size": 4, "settings": few}}}},
    )
    rows = rows_of(run)
    assert len(rows) == STEPS * 16
    assert {row["outcome"] for row in rows} == {"score"}
    assert all(row["detail"] in ("correct", "partly correct", "wrong") for row in rows)
    assert all("eval/sums/avg@1" in run.metrics[place] for place in (0, -1))


def test_an_environment_of_verifiers_trains(command_line: CommandLine) -> None:
    run = train(
        command_line,
        "played",
        data={"train": "verifiers:played", "tasks": {"settings": {"taskset": {"turns": 2}}}},
        rollout={"agent": {"function": "verifiers"}, "max_response_tokens": 40},
        reward={"name": "agent"},
    )
    rows = rows_of(run)
    assert {row["outcome"] for row in rows} == {"score"}
    assert len({row["reward"] for row in rows}) > 1 and min(row["reward"] for row in rows) >= 0.25
    assert any(not all(row["sampled_mask"]) for row in rows)  # the second question of the environment
    assert max(values(run, "agent/turns_max")) == 2


@slow
def test_a_tiny_model_learns_sums(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example whose results docs/environments.md shows, shorter."""
    folder = tmp_path_factory.mktemp("sums")
    monkeypatch.chdir(folder)
    tiny.main()
    run = CommandLine(folder).train("sums", "train.steps=40", config=EXAMPLES / "tiny_sums.yaml")
    assert run.status == 0, run.output[-5000:]
    rewards = values(run, "reward/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1, rewards
    assert max(values(run, "logprob/rollout_actor_max_diff")) < 1e-3
