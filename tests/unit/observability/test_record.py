"""Which rollouts are recorded, and that values stay with their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.observability.record import (
    CANDIDATE_POSITIONS,
    CANDIDATE_ROWS,
    CANDIDATE_TOKENS,
    MOST_TIME,
    Cost,
    candidate_positions,
    record,
    recorded_rows,
    write_candidates,
)
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.types import Prompt, Response, RewardResult


def group(number: int, *masks: list[bool]) -> Group:
    """A group with a response for each mask."""
    responses = tuple(
        Response(range(len(mask)), -0.1 * np.arange(1, len(mask) + 1), "stop", 3, sampled_mask=mask) for mask in masks
    )
    rewards = tuple(RewardResult(float(len(response)), text="!") for response in responses)
    return Group(number, number, Prompt(f"p:{number}", (1, 2), "?", None), 3, responses, rewards)


def batch_of(rollouts: Rollouts) -> SequenceBatch:
    return sequences_of((prompt.token_ids, response) for prompt, response, _ in rollouts.responses)


@given(
    lengths=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=8),
    most=st.integers(1, 400),
    step=st.integers(1, 5),
)
def test_complete_groups_within_the_limit_are_recorded(lengths: list[list[int]], most: int, step: int) -> None:
    groups = [group for group, own in enumerate(lengths) for _ in own]
    sizes = np.array([length for own in lengths for length in own])
    rows = recorded_rows(np.array(groups), sizes, step, most)
    chosen = {groups[i] for i in rows}
    assert rows.tolist() == [i for i, group in enumerate(groups) if group in chosen], "complete, and in their order"
    assert len(chosen) >= 1
    assert sizes[rows].sum() <= most or len(chosen) == 1
    if sizes.sum() <= most:
        assert len(rows) == len(groups)


def test_values_stay_with_their_tokens(tmp_path: Path) -> None:
    """A token that was not sampled has NaN, or False, where the actor has no value."""
    sampled, tool = [True] * 4, [True, False, False, True, True, False]
    groups = [
        group(0, [True] * 30, [True] * 20),
        group(1, sampled),
        group(2, sampled, []),
        group(3, tool, [False] * 2, sampled),
    ]
    rollouts = Rollouts(groups, np.array([True, False, True, True]), weight_version=3)
    batch = batch_of(rollouts)
    total = batch.num_sampled_tokens
    batch = batch.with_values(selected=np.arange(total) % 3 == 0)
    scores = {"log_probs": -np.arange(total, dtype=np.float32), "in_filter": np.arange(total) % 2}
    path = record(tmp_path, 1, rollouts, batch, np.arange(7.0), scores, most_tokens=20)
    rows = pq.read_table(path).to_pylist()
    assert [row["group"] for row in rows] == [2, 2, 3, 3, 3]
    assert sum(sum(row["sampled_mask"]) for row in rows) <= 20
    starts = np.cumsum([0, *batch.sampled_lengths])
    for row in rows:
        number = int(row["advantage"])
        prompt, response, reward = rollouts.responses[number]
        mask, place = response.sampled_mask, np.arange(starts[number], starts[number + 1])
        assert (row["prompt_id"], row["response"], row["reward"]) == (prompt.id, "!", reward.score)
        assert row["token_ids"] == response.token_ids.tolist() and row["sampled_mask"] == mask.tolist()
        assert row["log_probs"] == response.log_probs.tolist()
        for name, values in (("actor_log_probs", -place), ("kept", place % 2), ("selected", place % 3 == 0)):
            column = np.array(row[name])
            assert len(column) == len(mask)
            assert column[mask].tolist() == values.tolist()
            rest = column[~mask]
            assert not rest.any() if name == "selected" else np.isnan(rest.astype(np.float64)).all()


def test_candidates_are_written_at_the_marked_positions(tmp_path: Path) -> None:
    masks = [([True] * 3 + [False] * 40) * (200 if i % 2 else 10) for i in range(20)]
    rollouts = Rollouts([group(i, mask) for i, mask in enumerate(masks)], np.ones(20, dtype=bool), weight_version=3)
    batch = batch_of(rollouts)
    part = candidate_positions(batch, step=4)
    marked = part.values["wanted"]
    assert len(part) == CANDIDATE_ROWS and marked.sum() == CANDIDATE_POSITIONS
    assert part.sampled_lengths.max() <= CANDIDATE_TOKENS
    ids = np.arange(len(marked))[:, None] + np.arange(3)
    found = {"candidate_ids": ids, "candidate_log_probs": -ids.astype(np.float32)}
    rows = pq.read_table(write_candidates(tmp_path, 4, part, found)).to_pylist()
    assert len(rows) == CANDIDATE_POSITIONS
    for row, place in zip(rows, np.flatnonzero(marked), strict=True):
        assert row["token_id"] == batch.take([row["row"]]).targets[row["position"]]
        assert row["candidate_ids"] == [place, place + 1, place + 2] and row["step"] == 4


@given(
    steps=st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(0.001, 10.0)), min_size=1, max_size=60),
    every=st.integers(2, 10),
)
def test_dumps_stay_below_their_share_of_the_time(steps: list[tuple[float, float]], every: int) -> None:
    """Exceptions are the first dump, whose cost is not known, and what a dump costs more than the one before it."""
    cost, unforeseen, first = Cost(), 0.0, True
    for number, (rest, dump) in enumerate(steps, start=1):
        due = number == 1 or number % every == 0
        spent = dump if due and cost.affordable else 0.0
        if spent:
            unforeseen += dump if first else max(0.0, dump - cost.last)
            first = False
        cost.step(rest + spent, spent)
        assert cost.recording <= MOST_TIME * cost.run + unforeseen + 1e-9


def test_a_dump_left_out_is_made_up_for_when_there_is_time() -> None:
    cost = Cost()
    assert cost.affordable
    cost.step(1.0, 0.5)
    assert not cost.affordable, "1 s of dumps in 1 s"
    cost.step(48.0, 0.0)
    assert not cost.affordable
    cost.step(1.0, 0.0)
    assert cost.affordable, "1 s of dumps in 50 s"
