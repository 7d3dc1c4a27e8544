"""Which rollouts are recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.batching.sequences import rows_of
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
from megatron_rl.types import Generation, Prompt, RewardResult, Sample


def sample(group: int, length: int) -> Sample:
    prompt = Prompt(id=f"p:{group}", token_ids=(1, 2), text="?", label=None)
    generation = Generation(list(range(length)), [-0.1 * (i + 1) for i in range(length)], "stop", 3)
    return Sample(prompt, group, generation, "!", RewardResult(float(length)))


@given(
    lengths=st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4), min_size=1, max_size=8),
    most=st.integers(1, 400),
    step=st.integers(1, 5),
)
def test_whole_groups_within_the_limit(lengths: list[list[int]], most: int, step: int) -> None:
    groups = [group for group, own in enumerate(lengths) for _ in own]
    sizes = np.array([length for own in lengths for length in own])
    rows = recorded_rows(groups, sizes, step, most)
    chosen = {groups[i] for i in rows}
    assert rows.tolist() == [i for i, group in enumerate(groups) if group in chosen], "whole, and in their order"
    assert len(chosen) >= 1
    assert sizes[rows].sum() <= most or len(chosen) == 1
    if sizes.sum() <= most:
        assert len(rows) == len(groups)


def test_values_stay_with_their_tokens(tmp_path: Path) -> None:
    samples = [sample(group, length) for group, length in ((0, 30), (0, 20), (1, 4), (1, 0), (2, 5), (2, 6))]
    batch = rows_of(samples)
    total = batch.num_sampled_tokens
    batch = batch.with_values(selected=np.arange(total) % 3 == 0)
    seen = {"log_probs": -np.arange(total, dtype=np.float32), "kept": np.arange(total) % 2}
    path = record(tmp_path, 1, samples, np.arange(6.0), batch, seen, most_tokens=20)
    rows = pq.read_table(path).to_pylist()
    assert sum(len(row["token_ids"]) for row in rows) <= 20
    starts = np.cumsum([0, 30, 20, 4, 0, 5])
    for row in rows:
        number = int(row["advantage"])
        place = np.arange(starts[number], starts[number] + len(samples[number].generation.token_ids))
        assert row["prompt_id"] == samples[number].prompt.id
        assert row["actor_log_probs"] == (-place).tolist()
        assert row["kept"] == (place % 2).tolist() and row["selected"] == (place % 3 == 0).tolist()


def test_candidates_are_written_at_the_marked_positions(tmp_path: Path) -> None:
    samples = [sample(i, 600 if i % 2 else 30) for i in range(20)]
    part = candidate_positions(rows_of(samples), step=4)
    marked = part.values["wanted"]
    assert len(part) == CANDIDATE_ROWS and marked.sum() == CANDIDATE_POSITIONS
    assert part.sampled_lengths.max() <= CANDIDATE_TOKENS
    ids = np.arange(len(marked))[:, None] + np.arange(3)
    found = {"candidate_ids": ids, "candidate_log_probs": -ids.astype(np.float32)}
    rows = pq.read_table(write_candidates(tmp_path, 4, part, found)).to_pylist()
    assert len(rows) == CANDIDATE_POSITIONS
    for row, place in zip(rows, np.flatnonzero(marked), strict=True):
        assert row["token_id"] == samples[row["row"]].generation.token_ids[row["position"]]
        assert row["candidate_ids"] == [place, place + 1, place + 2] and row["step"] == 4


@given(
    steps=st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(0.001, 10.0)), min_size=1, max_size=60),
    every=st.integers(2, 10),
)
def test_dumps_stay_below_their_share_of_the_time(steps: list[tuple[float, float]], every: int) -> None:
    """But for the first, whose cost nobody knows, and what a dump costs more than the one before it."""
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
