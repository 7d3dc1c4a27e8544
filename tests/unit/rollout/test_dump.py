from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.rollout.dump import write_rollouts
from megatron_rl.types import Generation, Prompt, RewardResult, Sample


def sample(group: int, token_ids: list[int], reward: RewardResult | None) -> Sample:
    prompt = Prompt(id=f"train:{group}", token_ids=(1, 2), text="1 2 3 > 6 :", label=None)
    generation = Generation(token_ids, [-0.5] * len(token_ids), "stop" if token_ids else "abort", weight_version=7)
    return Sample(prompt=prompt, group=group, generation=generation, text="é 1 + 2", reward=reward)


SAMPLES = [sample(0, [5, 6, 7], RewardResult(1.0, "6", "correct")), sample(1, [], None), sample(1, [8], None)]


def test_a_row_a_sample_comes_back(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path / "rollouts", 10, SAMPLES, [0.5, 0.0, -0.5])
    assert path == tmp_path / "rollouts" / "step_000010.parquet"
    assert list(path.parent.iterdir()) == [path], "nothing half-written is left"
    table = pq.read_table(path)
    first, second, _ = table.to_pylist()
    assert first == {
        "step": 10,
        "group": 0,
        "prompt_id": "train:0",
        "prompt": "1 2 3 > 6 :",
        "prompt_token_ids": [1, 2],
        "response": "é 1 + 2",
        "token_ids": [5, 6, 7],
        "log_probs": [-0.5, -0.5, -0.5],
        "reward": 1.0,
        "answer": "6",
        "detail": "correct",
        "outcome": "score",
        "advantage": 0.5,
        "finish_reason": "stop",
        "weight_version": 7,
        "weight_versions": [7, 7, 7],
    }
    assert (second["token_ids"], second["reward"], second["finish_reason"]) == ([], None, "abort")
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_per_token_columns_keep_their_types(tmp_path: Path) -> None:
    entropy = [np.array([0.1, 0.2, 0.3], np.float32), np.array([], np.float32), np.array([0.4], np.float32)]
    selected = [np.array([True, False, True]), np.array([], bool), np.array([False])]
    table = pq.read_table(write_rollouts(tmp_path, 1, SAMPLES, [0, 0, 0], {"entropy": entropy, "selected": selected}))
    assert table["selected"].to_pylist() == [[True, False, True], [], [False]]
    assert [len(values) for values in table["entropy"].to_pylist()] == [3, 0, 1]
    assert str(table.schema.field("entropy").type.value_type) == "float"


def test_lengths_that_do_not_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 advantages for 3 samples"):
        write_rollouts(tmp_path, 1, SAMPLES, [0.0, 1.0])
    with pytest.raises(ValueError, match="entropy"):
        write_rollouts(tmp_path, 1, SAMPLES, [0.0] * 3, {"entropy": [np.zeros(3), np.zeros(1), np.zeros(1)]})
    assert not list(tmp_path.iterdir())


def test_a_second_column_of_one_name_is_refused(tmp_path: Path) -> None:
    column = [np.zeros(len(sample.generation.token_ids)) for sample in SAMPLES]
    with pytest.raises(ValueError, match="'log_probs'"):
        write_rollouts(tmp_path, 1, SAMPLES, [0.0] * 3, {"log_probs": column})


def test_a_place_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_rollouts(tmp_path / "rollouts", 1, SAMPLES, [0.0] * 3)


def test_no_samples_give_an_empty_file_with_the_same_columns(tmp_path: Path) -> None:
    table = pq.read_table(write_rollouts(tmp_path, 1, [], [], {"entropy": []}))
    assert table.num_rows == 0
    assert {"token_ids", "reward", "entropy"} <= set(table.column_names)
