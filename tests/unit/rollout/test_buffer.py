"""Whatever engines do, wherever a run is killed: no prompt is lost or used twice, no token is older than allowed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.checkpoint.rollout_buffer import read_buffer, write_buffer
from megatron_rl.rollout.buffer import Group, RolloutBuffer
from megatron_rl.rollout.collector import Rollouts, roll_out
from megatron_rl.types import Generation, RewardResult
from tests.unit.rollout.fake_engines import FakeEngines
from tests.unit.rollout.test_collector import run_of

STEPS = 8
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "over-sampled": {"over_sampling": 1.75},
    "partial": {"over_sampling": 1.75, "max_staleness": 1},
    "partial, long": {"over_sampling": 3.0, "max_staleness": 2},
    "one step ahead": {"max_staleness": 1, "asynchronous": True},
    "asynchronous": {"over_sampling": 2.0, "max_staleness": 3, "asynchronous": True},
}


def trained(rollouts: Rollouts, run: Any) -> list[int]:
    """The prompts of a step's groups, after looking at every token of theirs."""
    assert [sample.group for sample in rollouts.samples] == [g for g in rollouts.groups for _ in range(2)]
    assert len(rollouts.rewards) == len(rollouts.drawn)
    for k, sample in enumerate(rollouts.samples):
        generation = sample.generation
        row, length = sample.prompt.token_ids[0], len(generation.token_ids)
        assert generation.token_ids == [row, k % 2, *range(2, length)] and generation.finish_reason == "stop"
        assert len(generation.log_probs) == len(generation.weight_versions) == length
        assert generation.weight_versions == sorted(generation.weight_versions)
        assert run.weight_version - generation.weight_versions[0] <= run.config.versions_late
    return [sample.prompt.token_ids[0] for sample in rollouts.samples[::2]]


def killed_and_resumed(run: Any, folder: Path, engines: FakeEngines, **mode: Any) -> Any:
    """What a checkpoint has of it goes on in another process."""
    write_buffer(folder, run.buffer.groups)
    resumed = run_of(lambda prompt: prompt % 3 > 0, engines, **mode)
    resumed.buffer = RolloutBuffer.of(read_buffer(folder))
    resumed.cursor.load_state(run.cursor.state())
    resumed.weight_version = run.weight_version
    return resumed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "servers"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), dynamic=st.booleans(), killed_after=st.integers(1, STEPS))
def test_no_prompt_is_lost_or_used_twice(
    tmp_path_factory: pytest.TempPathFactory, mode: str, embedded: bool, seed: int, dynamic: bool, killed_after: int
) -> None:
    options: dict[str, Any] = {**MODES[mode], "dynamic_sampling": dynamic, "max_draws": 50}
    engines = FakeEngines(seed, embedded=embedded)
    run = run_of(lambda prompt: prompt % 3 > 0, engines, **options)
    used: Counter[int] = Counter()
    dull: Counter[int] = Counter()
    for step in range(1, STEPS + 1):
        rollouts = roll_out(run, step)
        now = trained(rollouts, run)
        assert len(now) == run.config.rollout.prompts_per_step
        used.update(now)
        dull.update({s.prompt.token_ids[0] for s in rollouts.drawn} - set(now))
        run.weight_version += 1  # training; engines that are not asynchronous have nothing to do
        for _ in range(engines.random.randint(0, 9)):
            engines.tick()
        engines.version = run.weight_version
        if step == killed_after:
            engines = FakeEngines(seed + 1, embedded=embedded)
            engines.version = run.weight_version
            run = killed_and_resumed(run, tmp_path_factory.mktemp("run"), engines, **options)
    assert max(used.values()) == 1, "trained on twice"
    left = [group.number for group in run.buffer.groups]
    assert len(left) == len(set(left)) and not set(left) & used.keys()
    there = used.keys() | dull.keys() | set(left)
    if run.config.keeps_rollouts:
        assert max(dull.values(), default=1) == 1 and there == set(range(run.cursor.taken))
        if dynamic:
            assert not any(prompt % 3 for prompt in dull), "an informative group was left out"
    else:
        assert not left and there <= set(range(run.cursor.taken))
    if mode == "synchronous":
        assert there == set(range(run.cursor.taken))


@pytest.mark.parametrize("mode", [name for name in MODES if "max_staleness" in MODES[name]])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_what_is_under_way_is_waited_for_before_it_is_too_old(mode: str, seed: int) -> None:
    """Without dynamic sampling, no token is ever sampled in vain."""
    engines = FakeEngines(seed, embedded=False, longest=30)
    run = run_of(set(range(100)), engines, dynamic_sampling=False, **MODES[mode])
    for step in range(1, STEPS + 1):
        rollouts = roll_out(run, step)
        assert rollouts.metrics["rollout/groups_begun_anew"] == 0
        assert len(rollouts.groups) == 4
        run.weight_version += 1
        engines.version = run.weight_version


def test_over_sampling_goes_on_with_the_first_groups_and_drops_the_rest() -> None:
    engines = FakeEngines(1, embedded=False, longest=40)
    run = run_of(set(range(100)), engines, dynamic_sampling=False, over_sampling=2.0)
    rollouts = roll_out(run, 1)
    assert len(rollouts.groups) == 4 and run.cursor.taken == 8
    assert not run.buffer.groups and not engines.requests
    unfinished, surplus = (rollouts.metrics[f"rollout/groups_{name}"] for name in ("unfinished", "surplus"))
    assert unfinished > 0 and unfinished + surplus == 4


def test_surplus_groups_are_trained_on_at_the_next_step() -> None:
    engines = FakeEngines(0, embedded=True, longest=3)  # many end together
    run = run_of(set(range(100)), engines, dynamic_sampling=False, over_sampling=2.0, max_staleness=1)
    first = set(trained(roll_out(run, 1), run))
    surplus = {group.row for group in run.buffer.whole}
    assert surplus and not surplus & first
    run.weight_version = engines.version = 1
    assert surplus <= set(trained(roll_out(run, 2), run))


def test_a_run_that_ends_leaves_nothing_under_way() -> None:
    engines = FakeEngines(3, embedded=False)
    run = run_of(set(range(100)), engines, dynamic_sampling=False, max_staleness=1, asynchronous=True)
    run.config.train.steps = 2
    roll_out(run, 1)
    assert len(engines.requests) == 4
    roll_out(run, 2)
    assert not engines.requests and not run.buffer.groups


def test_a_backlog_comes_back_bit_for_bit(tmp_path: Path) -> None:
    groups = [
        Group(3, 1, 7),
        Group(4, 2, 5, (Generation([1, 2, 3], [-0.1, -1 / 3, -2e-7], "abort", 5, ((1, 6), (2, 7))),) * 2),
        Group(9, 0, 7, (Generation([4], [-0.5], "stop", 7),), (RewardResult(1.0, "42", "correct"),)),
    ]
    write_buffer(tmp_path, groups)
    assert read_buffer(tmp_path) == groups


def test_a_checkpoint_without_a_backlog_has_none(tmp_path: Path) -> None:
    assert read_buffer(tmp_path) == []
