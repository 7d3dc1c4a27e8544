from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.rollout.dump import SCHEMA, DumpedResponse, write_rollouts
from megatron_rl.types import Prompt, Response, RewardResult


def dumped(group: int, response: Response, reward: RewardResult, advantage: float) -> DumpedResponse:
    prompt = Prompt(id=f"train:{group}", token_ids=(1, 2), text="1 2 3 > 6 :", label=None)
    return DumpedResponse(group, prompt, response, reward, advantage)


WITH_TOOL = Response([5, 6, 7], [-0.5, 0.0, -0.25], "stop", 7, ((2, 8),), [True, False, True])
LATE = RewardResult(0.0, detail="took too long", outcome="timeout", text="8")
ROWS = [
    dumped(0, WITH_TOOL, RewardResult(1.0, "6", "correct", text="é 1 + 2"), 0.5),
    dumped(1, Response([], [], "length", 7), RewardResult(0.0), 0.0),
    dumped(1, Response([8], [-0.5], "stop", 7), LATE, -0.5),
]


def test_a_dump_has_one_row_per_response(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "rollouts", 10, ROWS)
    assert path == tmp_path / "rollouts" / "step_000010.parquet"
    assert list(path.parent.iterdir()) == [path], "nothing half-written is left"
    table = pq.read_table(path)
    first, second, third = table.to_pylist()
    assert first == {
        "step": 10,
        "group": 0,
        "prompt_id": "train:0",
        "prompt": "1 2 3 > 6 :",
        "prompt_token_ids": [1, 2],
        "label": None,
        "response": "é 1 + 2",
        "token_ids": [5, 6, 7],
        "sampled_mask": [True, False, True],
        "log_probs": [-0.5, 0.0, -0.25],
        "reward": 1.0,
        "answer": "6",
        "detail": "correct",
        "outcome": "score",
        "advantage": 0.5,
        "finish_reason": "stop",
        "weight_version": 7,
        "weight_versions": [7, 7, 8],
        "rollout": None,
        "tool_calls": None,
        "tool_errors": None,
    }
    assert table.column_names == SCHEMA.names
    assert (second["token_ids"], second["sampled_mask"], second["finish_reason"]) == ([], [], "length")
    assert (third["outcome"], third["response"], third["advantage"]) == ("timeout", "8", -0.5)
    assert (second["reward"], third["reward"]) == (0.0, None), "a failed response has no reward, not even 0"
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_per_token_columns_keep_their_types(tmp_path: Path) -> None:
    entropy = [np.array([0.1, 0.2, 0.3], np.float32), np.array([], np.float32), np.array([0.4], np.float32)]
    selected = [np.array([True, False, True]), np.array([], bool), np.array([False])]
    table = pq.read_table(write_rollouts(tmp_path, 1, ROWS, {"entropy": entropy, "selected": selected}))
    assert table["selected"].to_pylist() == [[True, False, True], [], [False]]
    assert [len(values) for values in table["entropy"].to_pylist()] == [3, 0, 1]
    assert str(table.schema.field("entropy").type.value_type) == "float"


def test_lengths_that_do_not_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'entropy': not one value per response token"):
        write_rollouts(tmp_path, 1, ROWS, {"entropy": [np.zeros(3), np.zeros(1), np.zeros(1)]})
    assert not list(tmp_path.iterdir())


def test_a_second_column_of_one_name_is_refused(tmp_path: Path) -> None:
    column = [np.zeros(len(row.response)) for row in ROWS]
    for name in ("log_probs", "sampled_mask", "reward"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            write_rollouts(tmp_path, 1, ROWS, {name: column})


def test_a_folder_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_rollouts(tmp_path / "rollouts", 1, ROWS)


def test_no_responses_give_an_empty_file_with_the_same_columns(tmp_path: Path) -> None:
    table = pq.read_table(write_rollouts(tmp_path, 1, [], {"entropy": []}))
    assert table.num_rows == 0
    assert {"token_ids", "reward", "entropy"} <= set(table.column_names)
