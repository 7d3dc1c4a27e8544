"""Agents train: what tools wrote is seen and not trained, and all sequences of a rollout count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.rollout.dump import dumps
from tests.e2e_cpu.conftest import REPOSITORY, SHORT_WARM_START, CommandLine, Finished, values
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

STEPS = 3
SHORT = ("actor.tensor_parallel=1", f"train.steps={STEPS}", "observability.rollouts_every=1", "evaluation.every=0")


def rows_of(run: Finished) -> list[dict[str, Any]]:
    return [row for _, path in dumps(run.folder / "rollouts") for row in pq.read_table(path).to_pylist()]


def assert_contract(run: Finished) -> None:
    """Every sampled token has the log-prob that the actor gives it, whatever stands before it."""
    assert max(values(run, "logprob/rollout_actor_max_diff")) < 1e-3
    assert len(values(run, "train/loss")) == STEPS


def assert_contract_of_fresh_tokens(run: Finished) -> None:
    assert max(values(run, "logprob/fresh_abs_diff")) < 1e-3
    assert len(values(run, "train/loss")) == STEPS


def test_a_calculator_writes_results_that_are_seen_but_not_trained(command_line: CommandLine) -> None:
    run = command_line.train(
        "calculator", *SHORT_WARM_START, *SHORT, config=REPOSITORY / "examples/agents/countdown.yaml"
    )
    assert run.status == 0, run.output[-5000:]
    assert_contract(run)
    tokenizer = load_tokenizer(command_line.folder / "runs/countdown-task/model")
    rows = rows_of(run)
    assert len(rows) == STEPS * 16 * 8
    results = 0
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["token_ids"])
        for place, sampled in enumerate(row["sampled_mask"]):
            assert sampled == (place == 0 or words[place - 1] != "=")
            if not sampled:
                results += 1
                left, operator, right = words[place - 4 : place - 1]
                assert eval(f"{left}{operator}{right}") == int(words[place])
                assert row["log_probs"][place] == 0 and np.isnan(row["actor_log_probs"][place])
    assert results > len(rows)
    assert not any(row["detail"] == "wrong arithmetic" for row in rows)
    assert "eval/held_out/avg@8" in run.metrics[-1] and min(values(run, "agent/turns_mean")) > 2


@pytest.mark.parametrize("seed", [0, 1])
def test_training_makes_an_agent_use_its_calculator(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """The policy computes badly in its head, and training teaches it to ask: its reward rises with its calls."""
    folder = tmp_path_factory.getbasetemp() / "calculator"  # both seeds share the warm start
    folder.mkdir(exist_ok=True)
    run = CommandLine(folder).train(
        f"seed-{seed}",
        f"seed={seed}",
        "warm_start.batch_size=64",
        "train.steps=30",
        "evaluation.every=30",
        config=REPOSITORY / "examples/agents/calculator.yaml",
    )
    assert run.status == 0, run.output[-5000:]
    calls, rewards = values(run, "agent/tool_calls_mean"), values(run, "reward/mean")
    assert np.mean(calls[:3]) < 0.7 and np.mean(calls[-5:]) > 1.4, calls  # two calls compute an attempt
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.08, rewards
    before, after = values(run, "eval/fresh/avg@8")
    assert after > 2 * before
    calls = values(run, "eval/fresh/tool_calls_mean")
    assert calls[1] > calls[0] + 1
    assert max(values(run, "agent/turns_mean")) > 2 and max(values(run, "agent/tool_errors_mean")) < 0.2
    assert max(values(run, "logprob/rollout_actor_max_diff")) < 1e-3


@pytest.mark.parametrize("mode", ["partial", "asynchronous"])
def test_agents_train_on_rollouts_of_older_weights(quickstart: Callable[..., Finished], mode: str) -> None:
    """Each prompt is trained once, and no token is older than the bound allows."""
    run = quickstart(
        f"stale_agent_{mode}",
        *SHORT,
        "rollout.engines=1",
        "rollout.agent={function: tests.e2e_cpu.own_agents:two_attempts}",
        "reward.name=agent",
        "rollout.max_staleness=1",
        "rollout.asynchronous=true" if mode == "asynchronous" else "rollout.over_sampling=1.75",
        "algorithm.correction.weights=truncated",
        "train.save_every=2",
    )
    assert_contract_of_fresh_tokens(run)
    rows = rows_of(run)
    prompts: dict[int, set[str]] = {}
    for row in rows:
        assert set(row["weight_versions"]) <= {row["step"] - 2, row["step"] - 1} - {-1}
        prompts.setdefault(row["step"], set()).add(row["prompt_id"])
    assert len(rows) == 2 * STEPS * 16 * 8
    assert [len(found) for found in prompts.values()] == [16] * STEPS
    assert len(set.union(*prompts.values())) == STEPS * 16
    assert max(values(run, "rollout/staleness_max")) == 1


def test_two_sequences_of_a_rollout_share_its_advantage(quickstart: Callable[..., Finished]) -> None:
    run = quickstart(
        "two_attempts",
        *SHORT,
        "rollout.engines=1",
        "rollout.agent={function: tests.e2e_cpu.own_agents:two_attempts}",
        "reward.name=agent",
    )
    assert_contract(run)
    rows = rows_of(run)
    assert len(rows) == 2 * STEPS * 16 * 8
    of_rollout: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        of_rollout.setdefault((row["step"], row["group"], row["rollout"]), []).append(row)
    assert all(len(pair) == 2 and pair[0]["advantage"] == pair[1]["advantage"] for pair in of_rollout.values())
    for step in range(1, STEPS + 1):
        for group in range(16):
            rewards = [pair[0]["reward"] for key, pair in of_rollout.items() if key[:2] == (step, group)]
            advantages = [pair[0]["advantage"] for key, pair in of_rollout.items() if key[:2] == (step, group)]
            assert len(rewards) == 8  # each rollout counts once in its group's mean
            assert sum(advantages) == pytest.approx(0, abs=1e-6)
            assert (max(rewards) > min(rewards)) == any(advantages)


def test_rollouts_that_fail_have_no_reward_and_teach_nothing(quickstart: Callable[..., Finished]) -> None:
    run = quickstart(
        "failing_agent",
        *SHORT,
        "rollout.engines=1",
        "rollout.agent={function: tests.e2e_cpu.own_agents:fails_now_and_then}",
        "reward.max_failed_fraction=0.9",
    )
    assert_contract(run)
    rows = rows_of(run)
    failed = [row for row in rows if row["outcome"] == "error"]
    assert 0 < len(failed) < len(rows)
    assert all(row["reward"] is None and row["advantage"] == 0 for row in failed)
    assert (
        "RuntimeError: the environment is gone" in failed[0]["detail"] and "own_agents.py, line" in failed[0]["detail"]
    )
    fractions = values(run, "reward/error_fraction")
    assert sum(fractions[:STEPS]) > 0
    failed, scores = values(run, "eval/held_out/failed_fraction"), values(run, "eval/held_out/avg@8")
    assert len(failed) == len(scores) == 2 and all(0.02 < share < 0.4 for share in failed)
