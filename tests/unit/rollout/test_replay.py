"""Replay of dumps: those that this version writes, and those of former versions, which have no mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.rollout.dump import DumpedResponse, dumps, write_rollouts
from megatron_rl.rollout.replay import Replay
from megatron_rl.types import Prompt, Response, RewardResult

WITH_TOOL = Response([5, 6, 7], [-0.5, 0.0, -0.25], "stop", 7, sampled_mask=[True, False, True])
PLAIN = Response([5, 6], [-0.5, -0.125], "length", 6)


def write(folder: Path, step: int) -> Path:
    """Two groups, of which the second has the smaller number."""
    rows = [
        DumpedResponse(
            group,
            Prompt(f"train:{group}", (1, 2 + group), f"prompt {group}", label="9"),
            response,
            RewardResult(score, "9", "why", outcome, text=f"text {len(response)}"),
            advantage=0.5,
        )
        for group, response, score, outcome in (
            (4, WITH_TOOL, 1.0, "score"),
            (4, PLAIN, 0.0, "timeout"),
            (2, PLAIN, 0.25, "score"),
        )
    ]
    entropy = [np.zeros(len(row.response), np.float32) for row in rows]
    return write_rollouts(folder, step, rows, {"entropy": entropy})


@pytest.mark.parametrize("inside", ["", "rollouts"])
def test_recorded_steps_come_back_in_order(tmp_path: Path, inside: str) -> None:
    for step in (10, 3):
        write(tmp_path / inside, step)
    replay = Replay(tmp_path)
    assert len(replay) == 2 and [step for step, _ in dumps(tmp_path / inside)] == [3, 10]
    rollouts = replay.collect(1, 0)
    assert rollouts.weight_version is None and rollouts.trained.all() and not rollouts.drops_groups
    assert [group.number for group in rollouts.sampled] == [2, 4] and rollouts.group_numbers.tolist() == [0, 1, 1]
    assert [response for _, response, _ in rollouts.responses] == [PLAIN, WITH_TOOL, PLAIN]
    prompt, _, reward = rollouts.responses[2]
    assert (prompt.id, prompt.token_ids, prompt.text) == ("train:4", (1, 6), "prompt 4")
    assert reward == RewardResult(0.0, "9", "why", "timeout", "text 2")
    assert replay.pending == []


def test_a_dump_without_mask_is_sampled_throughout(tmp_path: Path) -> None:
    """Former versions wrote neither a mask nor, at first, outcomes."""
    path = write(tmp_path, 1)
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["sampled_mask", "outcome"]), path)
    responses = Replay(tmp_path).collect(1, 0).responses
    assert all(response.sampled_mask.all() and len(response.sampled_mask) for _, response, _ in responses)
    assert responses[1][1] == Response([5, 6, 7], [-0.5, 0.0, -0.25], "stop", 7)
    assert [reward.outcome for _, _, reward in responses] == ["score"] * 3


def test_a_dump_without_prompt_tokens_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["prompt_token_ids"]), path)
    with pytest.raises(UserError, match="has no column prompt_token_ids: record the rollouts again"):
        Replay(tmp_path).collect(1, 0)


def test_a_dump_without_responses_is_refused(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 3, [])
    with pytest.raises(UserError, match=r"step_000003\.parquet \(step 3\) holds no responses"):
        Replay(tmp_path).collect(1, 0)


def test_a_folder_without_dumps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no rollout dumps .*rollouts_every=1"):
        Replay(tmp_path)
