"""Rollouts of agents that last longer than a step: no prompt is lost or used twice, and each token has the version of
the weights that sampled it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rl.agent.model import Model
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.checkpoint.rollout_buffer import read_buffer, write_buffer
from megatron_rl.config.agent import AgentSettings
from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward.grading import Grading
from megatron_rl.rollout.buffer import RolloutBuffer
from megatron_rl.rollout.collector import RolloutCollector
from megatron_rl.types import AgentResponse, Prompt, Response, SamplingParams
from tests.tiers import slow
from tests.unit.agent.kit import TextEngines, end, sampling, tokenizer
from tests.unit.rollout.test_collector import collector_of

STEPS = 6
MODES: dict[str, dict[str, Any]] = {
    "partial": {"over_sampling": 1.75, "max_staleness": 1},
    "partial, long": {"over_sampling": 3.0, "max_staleness": 2},
    "one step ahead": {"max_staleness": 1, "asynchronous": True},
    "asynchronous": {"over_sampling": 2.0, "max_staleness": 3, "asynchronous": True},
}


class TickingServers:
    """`cluster.engines.Engines` whose requests get a token now and then. The log-prob of a token is its number,
    negated, and `versions` notes which weights sampled it."""

    embedded = False

    def __init__(self, seed: int, longest: int) -> None:
        self.random, self.longest, self.version = random.Random(seed), longest, 0
        self.versions: list[int] = []
        self.asked: dict[int, tuple[Response, int]] = {}
        """Number -> the tokens so far, and the length that the answer will have."""
        self.submitted = self.continued = 0

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        partial: Sequence[tuple[Response, ...]] | None = None,
    ) -> list[int]:
        numbers = list(range(self.submitted, self.submitted + len(prompts)))
        self.submitted += len(prompts)
        for number, before in zip(numbers, partial or [()] * len(prompts), strict=True):
            (start,) = before or (Response([], [], "abort", self.version),)  # type: ignore[arg-type]
            self.continued += len(start) > 0
            self.asked[number] = start, len(start) + self.random.randint(1, self.longest)
        return numbers

    def wait(self, ids: Iterable[int], seconds: float | None = None) -> set[int]:
        for number in self.asked:
            if self.random.random() < 0.3:
                self._sample(number)
        time.sleep(0.001 if seconds else 0.0)
        return {number for number in ids if self.asked[number][0].finish_reason == "stop"}

    def _sample(self, number: int) -> None:
        response, length = self.asked[number]
        if response.finish_reason == "abort":
            last = len(response) + 1 >= length
            token = end() if last else self.random.randrange(60, 90)
            sampled = Response([token], [-1.0 - len(self.versions)], "stop" if last else "abort", self.version)  # type: ignore[arg-type]
            self.versions.append(self.version)
            self.asked[number] = response.followed_by(sampled), length

    def take(self, request: int) -> list[Response]:
        return [self.asked.pop(request)[0]]

    def abort(self, ids: Iterable[int]) -> None: ...

    def cancel(self, ids: Iterable[int]) -> None:
        for number in ids:
            del self.asked[number]


async def plays(model: Model, prompt: Prompt) -> float:
    """Some turns, the last ones in a conversation of their own."""
    turns = random.Random(prompt.id).randint(1, 6)
    messages = [{"role": "user", "content": "ab"}]
    for turn in range(turns):
        if turn == 3:
            messages = [{"role": "user", "content": "the summary"}]
        messages += [await model.chat(messages), {"role": "user", "content": "ok"}]
        await asyncio.sleep(0.002)
    return float(turns % 2)


def rollouts_of(engines: Any, agent: Any = plays, **settings: Any) -> AgentRollouts:
    return AgentRollouts(AgentSettings(function="my:agent", **settings), agent, engines, tokenizer(), 5000)


def collector_with(rollouts: AgentRollouts, **settings: Any) -> RolloutCollector:
    collector = collector_of({}, rollouts, dynamic_sampling=False, **settings)
    collector.grader = Grading(SimpleNamespace(score=list), RewardSettings(name="agent"))  # type: ignore[arg-type]
    collector.sampling = lambda step, draw: sampling(2)
    return collector


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow)])
def test_prompts_are_trained_once_and_tokens_have_their_own_versions(mode: str, seed: int) -> None:
    engines = TickingServers(seed, longest=40)
    used: Counter[str] = Counter()
    trained: list[float] = []
    mixed = 0
    with rollouts_of(engines) as rollouts:
        collector = collector_with(rollouts, **MODES[mode])
        for step in range(1, STEPS + 1):
            found = collector.collect(step, step - 1)
            assert len(found.groups) == 4 and found.metrics["rollout/groups_begun_anew"] == 0
            used.update(group.prompt.id for group in found.groups)
            for _, response, reward in found.responses:
                assert isinstance(response, AgentResponse) and reward.outcome == "score"
                mixed += len({int(v) for one in response.sequences for v in np.unique(one.weight_versions)}) > 1
                for sequence in response.sequences:
                    versions = sequence.weight_versions[sequence.sampled_mask]
                    numbers = -1.0 - sequence.log_probs[sequence.sampled_mask]
                    assert versions.tolist() == [engines.versions[int(number)] for number in numbers]
                    assert versions.min() >= step - 1 - collector.settings.max_staleness
                    trained += numbers.tolist()
            for _ in range(30 if collector.settings.asynchronous else 0):  # the driver waits for the actor
                rollouts.keep_going()
                time.sleep(0.001)
            engines.version = step
        pending = {group.prompt.id for group in collector.pending}
    assert max(used.values()) == 1 and max(Counter(trained).values()) == 1
    assert not pending & used.keys()
    assert used.keys() | pending == {str(number) for number in range(collector.cursor.taken)}
    assert mixed, "no rollout was under way while the weights changed"
    assert engines.continued or collector.settings.asynchronous


@pytest.mark.parametrize("mode", ["partial, long", "asynchronous"])
def test_a_run_that_is_killed_samples_the_rollouts_under_way_again(tmp_path: Path, mode: str) -> None:
    """A checkpoint has the surplus rollouts with their tokens, and of those under way the prompts."""
    engines = TickingServers(7, longest=40)
    used: Counter[str] = Counter()
    with rollouts_of(engines) as rollouts:
        collector = collector_with(rollouts, **MODES[mode])
        for step in (1, 2):
            used.update(group.prompt.id for group in collector.collect(step, step - 1).groups)
            engines.version = step
        write_buffer(tmp_path, collector.pending)
        kept, cursor = collector.buffer.complete, collector.cursor.state()
    with rollouts_of(engines) as rollouts:
        collector = collector_with(rollouts, **MODES[mode])
        found = read_buffer(tmp_path, collector.prompts, lambda ids: str(tokenizer().decode(ids.tolist())))
        collector.buffer = RolloutBuffer.of(found)
        assert [group.responses for group in collector.buffer.complete] == [group.responses for group in kept]
        assert not any(group.responses for group in collector.buffer.waiting)
        collector.cursor.load_state(cursor)
        for step in (3, 4):
            used.update(group.prompt.id for group in collector.collect(step, step - 1).groups)
            engines.version = step
        pending = {group.prompt.id for group in collector.pending}
    assert max(used.values()) == 1 and sum(used.values()) == 16
    assert used.keys() | pending == {str(number) for number in range(collector.cursor.taken)}


def test_a_suspended_rollout_goes_on_from_its_last_token_and_its_time_stands_still() -> None:
    engines = TickingServers(0, longest=1)
    engines.random = SimpleNamespace(random=lambda: 0.0, randint=lambda a, b: 9, randrange=lambda a, b: a)  # type: ignore[assignment]

    async def asks(model: Model, prompt: Prompt) -> float:
        await model.generate([5, 6])
        return 1.0

    with rollouts_of(engines, asks, timeout_seconds=1.0) as rollouts:
        (number,) = rollouts.submit([Prompt("p", (5,), "", None)], sampling())
        while not engines.asked:
            rollouts.keep_going()
        assert rollouts.suspend([number]) == set() and not engines.asked
        time.sleep(1.2)  # an update takes longer than the rollout may
        rollouts.keep_going()
        assert not engines.asked
        engines.version = 1
        assert rollouts.wait([number]) == {number}
        (response,) = rollouts.take(number)
    assert isinstance(response, AgentResponse) and response.reward and response.reward.score == 1.0
    assert engines.continued == 1 and set(response.weight_versions.tolist()) == {0, 1}
    assert len(set(response.log_probs.tolist())) == len(response)


def test_an_evaluation_leaves_suspended_rollouts_alone() -> None:
    engines = TextEngines(lambda text: "ok", embedded=False)
    with rollouts_of(engines) as rollouts:
        (held,) = rollouts.submit([Prompt("held", (5,), "", None)], sampling(2))
        assert rollouts.suspend([held]) == set()
        ((response,),) = rollouts.generate([Prompt("evaluated", (5,), "", None)], sampling())
        assert response.num_sampled_tokens and not rollouts._groups[held].ended
        before = engines.submitted
        assert rollouts.wait([held]) == {held} and engines.submitted > before


def test_a_hanging_agent_that_was_suspended_still_takes_too_long() -> None:
    async def hangs(model: Model, prompt: Prompt) -> float:
        await asyncio.sleep(1e6)
        return 1.0

    with rollouts_of(TickingServers(0, 3), hangs, timeout_seconds=0.2) as rollouts:
        (number,) = rollouts.submit([Prompt("p", (5,), "", None)], sampling())
        rollouts.suspend([number])
        rollouts.wait([number])
        (response,) = rollouts.take(number)
    assert isinstance(response, AgentResponse) and response.reward and response.reward.outcome == "timeout"
