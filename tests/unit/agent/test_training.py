"""Rollouts of several sequences in a step: one reward and one advantage each, also after a dump and its replay."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.agent.session import Session
from megatron_rl.batching.mini_batches import mini_batches
from megatron_rl.batching.partition import partition, partition_trees
from megatron_rl.batching.sequences import sequences_of
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.observability.record import record
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.replay import Replay
from megatron_rl.rollout.rollouts import Rollouts, tokens_per_version
from megatron_rl.training.batch import TrainingBatch, training_batch
from megatron_rl.training.metrics import rollout_metrics
from megatron_rl.types import AgentResponse, AgentSequence, Prompt, Response, RewardResult
from tests.tiers import examples
from tests.unit.agent.kit import ROOM, STEPS, converse, made_up, sampling, tokenizer

FIRST = AgentSequence([7, 8], [-0.1, -0.2], "stop", 1, context=(1, 2, 3))  # type: ignore[arg-type]
FORKED = AgentResponse(
    [9, 5, 6],  # type: ignore[arg-type]
    [-0.3, 0.0, -0.4],  # type: ignore[arg-type]
    "stop",
    2,
    sampled_mask=[True, False, True],  # type: ignore[arg-type]
    context=(1, 2),
    others=(FIRST,),
    tool_calls=2,
    tool_errors=1,
)
PLAIN = Response([4], [-0.5], "stop", 2)  # type: ignore[arg-type]
LOST = AgentResponse([], [], "stop", 0, context=(1, 2))  # type: ignore[arg-type]


def rollouts() -> Rollouts:
    scores = (1.0, 0.0, 0.0)
    rewards = (*(RewardResult(score) for score in scores), RewardResult(0.0, outcome="timeout"))
    group = Group(0, 0, Prompt("p:0", (1, 2), "text", None), 2, (FORKED, PLAIN, PLAIN, LOST), rewards)
    return Rollouts([group], np.ones(1, dtype=bool), weight_version=2)


def batch_of(rollouts: Rollouts) -> TrainingBatch:
    algorithm = AlgorithmSettings.model_validate({"advantage": "dr_grpo"})
    config: Any = SimpleNamespace(
        algorithm=algorithm, rollout=SimpleNamespace(max_response_tokens=6), keeps_requests=False
    )
    batch, _ = training_batch(config, rollouts, lambda results: [result.score for result in results])
    return batch


def assert_as_trained(batch: TrainingBatch) -> None:
    """The baseline is the mean of three rewards, of which the first has two sequences; the fourth rollout failed."""
    assert [ids.tolist() for ids in batch.sequences.sequences] == [
        [1, 2, 3, 7, 8],
        [1, 2, 9, 5, 6],
        [1, 2, 4],
        [1, 2, 4],
        [1, 2],
    ]
    assert np.allclose(batch.advantages, [2 / 3, 2 / 3, -1 / 3, -1 / 3, 0])
    assert batch.counted.tolist() == [True, True, True, True, False]
    assert batch.groups.tolist() == [0] * 5
    assert np.allclose(batch.sequences.values["rollout_log_probs"], [-0.1, -0.2, -0.3, -0.4, -0.5, -0.5])


def test_all_sequences_of_a_rollout_have_its_advantage_and_it_counts_once() -> None:
    batch = batch_of(rollouts())
    assert_as_trained(batch)
    assert batch.fresh.tolist() == [False, False, True, True, True, True]
    metrics = rollout_metrics(rollouts(), batch.advantages)
    assert metrics["response_length/max"] == 4 and metrics["reward/mean"] == 1 / 3
    assert metrics["agent/turns_max"] == 3 and metrics["agent/sequences_mean"] == 1.5
    assert tokens_per_version(rollouts().sampled) == {1: 2, 2: 4}
    assert rollouts().sampled[0].oldest_version == 1


def test_a_dump_of_several_sequences_is_replayed_as_it_was(tmp_path: Path) -> None:
    before = rollouts()
    batch = batch_of(before)
    record(tmp_path, 1, before, batch.sequences, batch.advantages, {}, most_tokens=10_000)
    replayed = Replay(tmp_path).collect(1, 0)
    again = batch_of(replayed)
    assert_as_trained(again)
    assert [len(response.sequences) for _, response, _ in replayed.responses] == [2, 1, 1, 1]
    first = replayed.responses[0][1]
    assert isinstance(first, AgentResponse) and (first.turns, first.tool_calls, first.tool_errors) == (3, 2, 1)


@examples(50)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 3), budget=st.integers(40, 400))
def test_every_sampled_token_of_branched_rollouts_is_in_one_micro_batch(seed: int, ranks: int, budget: int) -> None:
    rng, answered = random.Random(seed), [0]

    async def sample(prompt: Any, params: Any) -> Response:
        answer = made_up(rng)
        answered[0] += len(answer)
        numbers = np.arange(answered[0] - len(answer), answered[0])
        return Response(answer.token_ids, -1.0 - numbers, answer.finish_reason, 0)

    def rollout() -> AgentResponse:
        session = Session(tokenizer(), sample, sampling(), ROOM)
        asyncio.run(converse(session, rng, rng.choices(STEPS, k=5)))
        return session.recorded((0,), None)

    batch = sequences_of([((0,), rollout()) for _ in range(3)])
    rows = batch.sequences
    for shares in (
        partition_trees(rows, ranks, token_budget=budget),
        partition(batch.lengths.tolist(), ranks, token_budget=budget),
        partition(batch.lengths.tolist(), ranks, token_budget=budget, packed=False),
    ):
        assert len(shares) == ranks
        taken = [batch.take(part).values["rollout_log_probs"] for share in shares for part in share]
        assert np.array_equal(np.sort(-1.0 - np.concatenate(taken)), np.arange(answered[0]))


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (4, 2)])
def test_the_sequences_of_a_rollout_are_in_the_same_mini_batch(updates: int, epochs: int) -> None:
    one = rollouts().sampled[0]
    many = Rollouts([one, one, one], np.ones(3, dtype=bool), weight_version=2)
    batch = batch_of(many)
    for rows in mini_batches(batch.groups, updates=updates, epochs=epochs, seed=0):
        assert len(rows) % 5 == 0 and all(count == 5 for count in np.unique(batch.groups[rows], return_counts=True)[1])
