"""Whatever engines do and whenever a run is killed, no prompt is lost or used twice, and no token is too old."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.checkpoint.rollout_buffer import BUFFER_FILE, read_buffer, write_buffer
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group, RolloutBuffer
from megatron_rl.rollout.collector import RolloutCollector
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.types import AgentResponse, AgentSequence, Prompt, Response, RewardResult
from tests.tiers import examples
from tests.unit.rollout.fake_engines import FakeEngines
from tests.unit.rollout.test_collector import collector_of

STEPS = 8
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "over-sampled": {"over_sampling": 1.75},
    "partial": {"over_sampling": 1.75, "max_staleness": 1},
    "partial, long": {"over_sampling": 3.0, "max_staleness": 2},
    "one step ahead": {"max_staleness": 1, "asynchronous": True},
    "asynchronous": {"over_sampling": 2.0, "max_staleness": 3, "asynchronous": True},
}


def trained(rollouts: Rollouts, collector: RolloutCollector) -> list[int]:
    """The prompts of a step's groups, after a look at each of their tokens."""
    numbers = np.repeat(np.flatnonzero(rollouts.trained), 2)
    assert rollouts.group_numbers.tolist() == numbers.tolist()
    assert all(len(group.rewards) == len(group.responses) == 2 for group in rollouts.sampled)
    for k, (prompt, response, reward) in enumerate(rollouts.responses):
        row, length = prompt.token_ids[0], len(response)
        assert response.token_ids.tolist() == [row, k % 2, *range(2, length)] and response.finish_reason == "stop"
        assert response.sampled_mask.tolist() == [True, True, *(token % 4 != 0 for token in range(2, length))]
        versions = response.weight_versions
        assert len(response.log_probs) == len(versions) == length
        assert (np.diff(versions) >= 0).all()
        assert rollouts.weight_version is not None
        assert rollouts.weight_version - versions[0] <= collector.config.versions_late
        assert reward.text == f"{row} {k % 2}"
    return [prompt.token_ids[0] for prompt, _, _ in rollouts.responses[::2]]


def decode(token_ids: Any) -> str:
    """Restores the text that `Grader` gives."""
    return f"{token_ids[0]} {token_ids[1]}"


def killed_and_resumed(
    collector: RolloutCollector, folder: Path, engines: FakeEngines, **mode: Any
) -> RolloutCollector:
    """Another process continues from the checkpoint of a collector."""
    write_buffer(folder, collector.pending)
    resumed = collector_of(lambda prompt: prompt % 3 > 0, engines, **mode)
    resumed.buffer = RolloutBuffer.of(read_buffer(folder, resumed.prompts, decode))
    assert resumed.pending == collector.pending
    resumed.cursor.load_state(collector.cursor.state())
    return resumed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "servers"])
@examples(15)
@given(seed=st.integers(0, 2**16), dynamic=st.booleans(), killed_after=st.integers(1, STEPS))
def test_no_prompt_is_lost_or_used_twice(
    tmp_path_factory: pytest.TempPathFactory, mode: str, embedded: bool, seed: int, dynamic: bool, killed_after: int
) -> None:
    options: dict[str, Any] = {**MODES[mode], "dynamic_sampling": dynamic, "max_draws": 50}
    engines = FakeEngines(seed, embedded=embedded)
    collector = collector_of(lambda prompt: prompt % 3 > 0, engines, **options)
    used: Counter[int] = Counter()
    left_out: Counter[int] = Counter()
    for step in range(1, STEPS + 1):
        rollouts = collector.collect(step, step - 1)
        now = trained(rollouts, collector)
        assert len(now) == collector.settings.prompts_per_step
        used.update(now)
        left_out.update({group.prompt.token_ids[0] for group in rollouts.sampled} - set(now))
        for _ in range(engines.random.randint(0, 9)):  # training; engines that are not asynchronous have nothing to do
            engines.tick()
        engines.version = step
        if step == killed_after:
            engines = FakeEngines(seed + 1, embedded=embedded)
            engines.version = step
            collector = killed_and_resumed(collector, tmp_path_factory.mktemp("run"), engines, **options)
    assert max(used.values()) == 1, "trained on twice"
    pending = [group.number for group in collector.pending]
    assert len(pending) == len(set(pending)) and not set(pending) & used.keys()
    known = used.keys() | left_out.keys() | set(pending)
    if collector.config.keeps_rollouts:
        assert max(left_out.values(), default=1) == 1 and known == set(range(collector.cursor.taken))
        if dynamic:
            assert not any(prompt % 3 for prompt in left_out), "a group with signal was left out"
    else:
        assert not pending and known <= set(range(collector.cursor.taken))
    if mode == "synchronous":
        assert known == set(range(collector.cursor.taken))


@pytest.mark.parametrize("mode", [name for name in MODES if "max_staleness" in MODES[name]])
@examples(15)
@given(seed=st.integers(0, 2**16))
def test_groups_in_flight_are_waited_for_before_they_are_too_old(mode: str, seed: int) -> None:
    """Without dynamic sampling, no token is ever sampled in vain."""
    engines = FakeEngines(seed, embedded=False, longest=30)
    collector = collector_of(range(100), engines, dynamic_sampling=False, **MODES[mode])
    for step in range(1, STEPS + 1):
        rollouts = collector.collect(step, step - 1)
        assert rollouts.metrics["rollout/groups_begun_anew"] == 0
        assert len(rollouts.groups) == 4
        engines.version = step


def test_over_sampling_continues_with_the_first_groups_and_drops_the_rest() -> None:
    engines = FakeEngines(1, embedded=False, longest=40)
    collector = collector_of(range(100), engines, dynamic_sampling=False, over_sampling=2.0)
    rollouts = collector.collect(1, 0)
    assert len(rollouts.groups) == 4 and collector.cursor.taken == 8
    assert not collector.pending and not engines.requests
    unfinished, surplus = (rollouts.metrics[f"rollout/groups_{name}"] for name in ("unfinished", "surplus"))
    assert unfinished > 0 and unfinished + surplus == 4


def test_surplus_groups_are_trained_on_at_the_next_step() -> None:
    engines = FakeEngines(0, embedded=True, longest=3)  # many end together
    collector = collector_of(range(100), engines, dynamic_sampling=False, over_sampling=2.0, max_staleness=1)
    first = set(trained(collector.collect(1, 0), collector))
    surplus = {group.row for group in collector.buffer.complete}
    assert surplus and not surplus & first
    engines.version = 1
    assert surplus <= set(trained(collector.collect(2, 1), collector))


def test_a_run_that_ends_leaves_nothing_in_flight() -> None:
    engines = FakeEngines(3, embedded=False)
    collector = collector_of(range(100), engines, dynamic_sampling=False, max_staleness=1, asynchronous=True)
    collector.config.train.steps = 2
    collector.collect(1, 0)
    assert len(engines.requests) == 4
    collector.collect(2, 1)
    assert not engines.requests and not collector.pending


PROMPTS = [Prompt(f"p:{row}", (row,), "", None) for row in range(3)]


def test_a_buffer_file_restores_the_groups_bit_for_bit(tmp_path: Path) -> None:
    """Prompts come from the training data, and texts of graded responses from the tokenizer."""
    partial = Response([1, 2, 3], [-0.1, -1 / 3, -2e-7], "abort", 5, ((1, 6), (2, 7)))
    masked = Response([1, 2, 3], [-0.1, 0.0, -0.5], "abort", 5, ((1, 6),), [True, False, True])
    groups = [
        Group(3, 1, PROMPTS[1], 7),
        Group(4, 2, PROMPTS[2], 5, (partial, masked)),
        Group(9, 0, PROMPTS[0], 7, (Response([4, 5], [-0.5, -0.25], "stop", 7),), (GRADED,)),
        Group(10, 0, PROMPTS[0], 7, (Response([4, 5], [], "abort", 7), partial)),
    ]
    write_buffer(tmp_path, groups)
    assert read_buffer(tmp_path, PROMPTS, decode) == groups


@pytest.mark.parametrize("graded", ["answer", "transcript"])
def test_a_buffer_file_restores_all_sequences_of_an_agent(tmp_path: Path, graded: Any) -> None:
    first = AgentSequence([4, 5], [-0.5, -0.25], "stop", 3, ((1, 4),), context=(7, 8))  # type: ignore[arg-type]
    rollout = AgentResponse(
        [1, 2, 3],  # type: ignore[arg-type]
        [-0.1, 0.0, -0.5],  # type: ignore[arg-type]
        "stop",
        4,
        ((2, 5),),
        [True, False, True],  # type: ignore[arg-type]
        context=(7,),
        others=(first, first),
        tool_calls=2,
        tool_errors=1,
        graded=graded,
    )
    plain = Response([4, 5], [-0.5, -0.25], "stop", 7)  # type: ignore[arg-type]
    write_buffer(tmp_path, [Group(3, 1, PROMPTS[1], 7), Group(4, 2, PROMPTS[2], 5, (plain, rollout), (GRADED, GRADED))])
    empty, group = read_buffer(tmp_path, PROMPTS, lambda ids: " ".join(map(str, ids)))
    assert empty.responses == () and group.responses == (plain, rollout)
    found = group.responses[1]
    assert isinstance(found, AgentResponse) and found.others == (first, first) and found.others[0].context == (7, 8)
    assert (found.context, found.tool_calls, found.tool_errors, found.graded) == ((7,), 2, 1, graded)
    assert group.rewards[1].text == ("3" if graded == "answer" else "1 2 3")
    assert group.oldest_version == 3


def test_a_graded_response_that_cannot_be_decoded_is_restored_without_text(tmp_path: Path) -> None:
    failed = RewardResult(0.0, detail="the response cannot be decoded", outcome="error")
    groups = [Group(3, 1, PROMPTS[1], 7, (Response([4, 5], [-0.5, -0.25], "stop", 7),), (failed,))]
    write_buffer(tmp_path, groups)
    assert read_buffer(tmp_path, PROMPTS, refuse) == groups


def test_a_failure_in_the_buffer_stays_without_a_reward(tmp_path: Path) -> None:
    """Whatever score the file has beside it: earlier versions wrote 0."""
    responses = tuple(Response([4, 5], [-0.5, -0.25], "stop", 7) for _ in range(3))
    rewards = (GRADED, RewardResult(0.0, outcome="timeout", text="4 5"), GRADED)
    write_buffer(tmp_path, [Group(3, 1, PROMPTS[1], 7, responses, rewards)])
    (group,) = read_buffer(tmp_path, PROMPTS, decode)
    assert group.complete and group.scores == [1.0, 1.0] and not group.has_signal


def test_a_buffer_of_other_data_is_named(tmp_path: Path) -> None:
    write_buffer(tmp_path, [Group(3, len(PROMPTS), PROMPTS[1], 7, (), ())])
    with pytest.raises(UserError, match=rf"{BUFFER_FILE} holds no rollout buffer of this run's data .*resume=PATH"):
        read_buffer(tmp_path, PROMPTS, decode)


def refuse(token_ids: object) -> str:
    raise OverflowError("no such token")


GRADED = RewardResult(1.0, "42", "correct", text="4 5")


def test_a_buffer_file_without_mask_is_read_as_sampled_throughout(tmp_path: Path) -> None:
    """The format of former versions: the struct of a response has no mask, and log-probs are float64."""
    response = pa.struct(
        [
            ("token_ids", pa.list_(pa.int32())),
            ("log_probs", pa.list_(pa.float64())),
            ("finish_reason", pa.string()),
            ("weight_version", pa.int64()),
            ("version_changes", pa.list_(pa.list_(pa.int64()))),
        ]
    )
    reward = pa.struct(
        [("score", pa.float64()), ("answer", pa.string()), ("detail", pa.string()), ("outcome", pa.string())]
    )
    schema = pa.schema(
        [
            *((name, pa.int64()) for name in ("number", "row", "since")),
            ("responses", pa.list_(response)),
            ("rewards", pa.list_(reward)),
        ]
    )
    partial = {
        "token_ids": [1, 2, 3],
        "log_probs": [-0.1, -1 / 3, -2e-7],
        "finish_reason": "abort",
        "weight_version": 5,
        "version_changes": [[1, 6], [2, 7]],
    }
    ended = partial | {"token_ids": [4, 5], "log_probs": [-0.5, -0.25], "finish_reason": "stop", "version_changes": []}
    graded = {"score": 1.0, "answer": "42", "detail": "correct", "outcome": "score"}
    rows = [
        {"number": 3, "row": 1, "since": 7, "responses": [], "rewards": []},
        {"number": 4, "row": 2, "since": 5, "responses": [partial], "rewards": []},
        {"number": 9, "row": 0, "since": 7, "responses": [ended], "rewards": [graded]},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / BUFFER_FILE)
    assert read_buffer(tmp_path, PROMPTS, decode) == [
        Group(3, 1, PROMPTS[1], 7),
        Group(4, 2, PROMPTS[2], 5, (Response([1, 2, 3], [-0.1, -1 / 3, -2e-7], "abort", 5, ((1, 6), (2, 7))),)),
        Group(9, 0, PROMPTS[0], 7, (Response([4, 5], [-0.5, -0.25], "stop", 5),), (GRADED,)),
    ]


def test_a_checkpoint_without_a_buffer_file_has_no_groups(tmp_path: Path) -> None:
    assert read_buffer(tmp_path, PROMPTS, decode) == []
