"""Tests of the token figures and the viewer against the dump as read by pyarrow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.errors import UserError
from megatron_rl.observability.report import token_figures
from megatron_rl.observability.report.responses import FILTERED, NOT_SAMPLED, SELECTED, response_groups
from megatron_rl.observability.report.run_data import read_run
from megatron_rl.observability.report.tokens import Vocabulary, class_of_tokens, read_ids, read_tokens

CLASSES = {"retry": ["wait"], "filler": ["hmm", "so"]}


def dumped(folder: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
    return rows


@pytest.fixture
def vocabulary(recorded_run: Path) -> Vocabulary:
    return Vocabulary([recorded_run / "nowhere", recorded_run])


def test_a_dump_is_read_as_flat_arrays(recorded_run: Path) -> None:
    step, path = read_run(recorded_run).dumps[1]
    table, rows = read_tokens(step, path), dumped(recorded_run, 100)
    assert step == table.step == 100
    assert table.ids.tolist() == [token for row in rows for token in row["token_ids"]]
    assert np.allclose(table.log_probs, [value for row in rows for value in row["actor_log_probs"]])
    assert table.kept.tolist() == [value for row in rows for value in row["kept"]]
    assert table.advantages.tolist() == [row["advantage"] for row in rows for _ in row["token_ids"]]


def test_the_engine_s_log_probs_replace_missing_ones_of_the_actor(recorded_run: Path) -> None:
    """GRPO without `score_dropped` records NaN, and a run without a proxy records no such column."""
    path = recorded_run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    bare = table.drop_columns(["actor_log_probs", "entropy", "kept", "selected"])
    pq.write_table(bare, path)
    tokens = read_tokens(1, path)
    assert np.allclose(tokens.log_probs, [value for row in table.to_pylist() for value in row["log_probs"]])
    assert np.isnan(tokens.entropy).all() and not tokens.kept.any() and not tokens.selected.any()
    groups = response_groups([(1, path)], Vocabulary([recorded_run]))
    assert all(mark == 0 for group in groups for sample in group["samples"] for mark in sample["marks"])


def test_words_match_their_class_regardless_of_case_and_spaces(vocabulary: Vocabulary) -> None:
    ids = np.arange(9)
    assert class_of_tokens(ids, vocabulary, {"retry": ["WAIT"], "filler": ["hmm"]}).tolist() == [
        -1, -1, -1, 0, 1, -1, -1, -1, -1,
    ]  # fmt: skip
    assert vocabulary.text(3) == "wait" and Vocabulary([]).text(3) == "#3"


def test_frequency_is_the_share_of_tokens(recorded_run: Path, vocabulary: Vocabulary) -> None:
    tokens = [token for row in dumped(recorded_run, 200) for token in row["token_ids"]]
    found = token_figures.frequency([(200, np.array(tokens))], vocabulary, CLASSES)
    assert found.steps == [200]
    assert found.values["retry"] == [pytest.approx(tokens.count(3) / len(tokens), rel=1e-3)]
    assert found.values["filler"] == [pytest.approx(tokens.count(4) / len(tokens), rel=1e-3)]


def test_unlikely_candidates_of_a_class_are_averaged(vocabulary: Vocabulary) -> None:
    ids, p = np.array([3, 0, 3, 4, 3]), np.array([0.04, 0.9, 0.06, 0.5, 0.3])
    found = token_figures.candidate_probability([(5, ids, np.log(p))], vocabulary, CLASSES)
    assert found.steps == [5] and found.values == {"retry": [pytest.approx(0.05)], "filler": [None]}


def test_violins_hold_the_probabilities_of_their_class(recorded_run: Path, vocabulary: Vocabulary) -> None:
    tables = [read_tokens(step, path) for step, path in read_run(recorded_run).dumps]
    figure = token_figures.violins(tables, vocabulary, CLASSES)
    drawn = {trace["name"]: trace for trace in figure.traces}
    expected = [
        np.log10(np.exp(log_prob))
        for step in (1, 100, 200)
        for row in dumped(recorded_run, step)
        for token, log_prob in zip(row["token_ids"], row["actor_log_probs"], strict=True)
        if token == 4
    ]
    assert drawn["filler"]["y"] == pytest.approx(expected, rel=1e-3)


def test_the_scatter_plot_has_every_token_of_the_step_once(recorded_run: Path, vocabulary: Vocabulary) -> None:
    table = read_tokens(*read_run(recorded_run).dumps[-1])
    figure = token_figures.scatter(table, vocabulary, CLASSES)
    assert sum(len(trace["x"]) for trace in figure.traces) == len(table.ids)
    assert all(0 < x <= 1 for trace in figure.traces for x in trace["x"])


def test_the_clouds_show_the_most_extreme_one_percent(recorded_run: Path, vocabulary: Vocabulary) -> None:
    table = read_tokens(*read_run(recorded_run).dumps[-1])
    least, undecided = token_figures.clouds(table, vocabulary, CLASSES)
    count = max(1, len(table.ids) // 100)
    assert sum(n for _, n, _ in least.words) == sum(n for _, n, _ in undecided.words) == count
    assert least.words[0][0] == vocabulary.text(int(table.ids[np.argmin(table.log_probs)]))
    assert undecided.words[0][0] == vocabulary.text(int(table.ids[np.argmax(table.entropy)]))


def test_the_viewer_shows_groups_in_which_the_loss_acts_first(recorded_run: Path, vocabulary: Vocabulary) -> None:
    first, *others = response_groups(read_run(recorded_run).dumps[:1], vocabulary)
    assert first["prompt_id"] == "train:0" and len(first["samples"]) == 4
    assert {sample["advantage"] for sample in first["samples"]} == {-1.0, 1.0}
    assert all(sample["advantage"] == 0 for group in others for sample in group["samples"])
    row, sample = dumped(recorded_run, 1)[0], first["samples"][0]
    assert sample["texts"] == [vocabulary.text(token) for token in row["token_ids"]]
    assert sample["p"] == pytest.approx(np.exp(row["actor_log_probs"]), rel=5e-3)
    assert [bool(mark & SELECTED) for mark in sample["marks"]] == row["selected"]
    assert [not mark & FILTERED for mark in sample["marks"]] == row["kept"]


def test_a_broken_dump_is_an_error_with_its_name(recorded_run: Path) -> None:
    path = recorded_run / "rollouts" / "step_000100.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step_000100\.parquet"):
        read_tokens(100, path)


def test_tokens_that_were_not_sampled_do_not_count(recorded_run: Path) -> None:
    """Figures read sampled tokens only; the viewer shows the others, and marks them."""
    path = recorded_run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    masks = [[place % 3 > 0 for place in range(len(ids))] for ids in table["token_ids"].to_pylist()]
    place = table.column_names.index("sampled_mask")
    pq.write_table(table.set_column(place, "sampled_mask", pa.array(masks, pa.list_(pa.bool_()))), path)
    tokens, rows = read_tokens(1, path), dumped(recorded_run, 1)
    flat = [(row, i) for row in rows for i in range(len(row["token_ids"])) if i % 3 > 0]
    assert tokens.ids.tolist() == read_ids(path).tolist() == [row["token_ids"][i] for row, i in flat]
    assert tokens.selected.tolist() == [row["selected"][i] for row, i in flat]
    assert tokens.advantages.tolist() == [row["advantage"] for row, _ in flat]
    for group in response_groups([(1, path)], Vocabulary([recorded_run])):
        for sample in group["samples"]:
            context, *marks = sample["marks"]
            assert context == NOT_SAMPLED and sample["turns"] == [("prompt", 0), ("response", 1)]
            assert [mark == NOT_SAMPLED for mark in marks] == [i % 3 == 0 for i in range(len(marks))]
            assert sample["tokens"] == sum(mark != NOT_SAMPLED for mark in marks)


def test_violins_stand_in_the_order_of_the_steps(recorded_run: Path, vocabulary: Vocabulary) -> None:
    """The first class has no value at step 1; plotly would put that step last."""
    tables = [read_tokens(step, path) for step, path in read_run(recorded_run).dumps]
    ids = tables[0].ids.copy()
    ids[ids == 3] = 0
    tables[0] = replace(tables[0], ids=ids)
    axis = token_figures.violins(tables, vocabulary, CLASSES).layout["xaxis"]
    assert axis["categoryorder"] == "array" and axis["categoryarray"] == ["step 1", "step 100", "step 200"]


def test_a_response_is_right_wrong_or_not_graded(recorded_run: Path, vocabulary: Vocabulary) -> None:
    path = recorded_run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    outcomes = ["timeout", *["score"] * (len(table) - 1)]
    place = table.column_names.index("outcome")
    pq.write_table(table.set_column(place, "outcome", pa.array(outcomes)), path)
    first = response_groups([(1, path)], vocabulary)[0]
    assert [sample["verdict"] for sample in first["samples"]] == ["not graded", "right", "wrong", "right"]
    assert first["label"] == "24"
    pq.write_table(table.drop_columns(["label"]), path)
    assert response_groups([(1, path)], vocabulary)[0]["label"] is None, "a dump of an earlier version has no label"
