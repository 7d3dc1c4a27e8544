from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.config.observability import ObservabilitySettings
from megatron_rl.errors import UserError
from megatron_rl.observability.metrics import MetricsLog, has_metrics, is_unchanged, metric_names, read_metrics, series
from megatron_rl.observability.sinks import open_sinks


def write_steps(folder: Path, steps: range, *, tensorboard: bool = False, keep_up_to_step: int | None = None) -> None:
    settings = ObservabilitySettings(tensorboard=tensorboard)
    sinks = open_sinks(settings, "run", folder, {}, keep_up_to_step)
    log = MetricsLog(folder, keep_up_to_step=keep_up_to_step, sinks=sinks)
    for step in steps:
        log.write(step, {"reward/mean": step / 10})


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    MetricsLog(tmp_path, keep_up_to_step=None).write(3, {"train/loss": 0.25, "reward/mean": None})
    (row,) = read_metrics(tmp_path)
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "train/loss": 0.25, "reward/mean": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_become_null(tmp_path: Path, value: float) -> None:
    MetricsLog(tmp_path, keep_up_to_step=None).write(1, {"a": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["a"] is None


def test_each_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, keep_up_to_step=None)
    for step in range(1, 4):
        log.write(step, {"a": 1.0})
        assert steps_in(tmp_path) == list(range(1, step + 1))


@given(torn=st.sampled_from(['{"step": 5, "rew', "{", '{"time": 1}', "\0\0\0", "17"]))
def test_an_incomplete_last_line_is_ignored_and_removed_on_resume(
    tmp_path_factory: pytest.TempPathFactory, torn: str
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_steps(folder, range(1, 5))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps_in(folder) == [1, 2, 3, 4]
    write_steps(folder, range(5, 7), keep_up_to_step=4)
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6]


def test_a_broken_line_before_the_last_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(("keep", "expected"), [(-1, [9]), (0, [0, 9]), (2, [0, 1, 2, 9]), (50, [0, 1, 2, 3, 4, 9])])
def test_resume_drops_lines_after_the_checkpoint(tmp_path: Path, keep: int, expected: list[int]) -> None:
    write_steps(tmp_path, range(5))
    write_steps(tmp_path, range(9, 10), keep_up_to_step=keep)
    assert steps_in(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "no partial file is left"


def test_a_run_without_metrics_can_be_resumed(tmp_path: Path) -> None:
    write_steps(tmp_path / "new", range(1, 3), keep_up_to_step=0)
    assert steps_in(tmp_path / "new") == [1, 2]


def test_changed_lines_before_a_checkpoint_are_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path, range(3))
    log = MetricsLog(tmp_path, keep_up_to_step=2)
    log.write(3, {"reward/mean": None})
    written, path = log.written, tmp_path / "metrics.jsonl"
    assert is_unchanged(tmp_path, written)
    log.write(4, {"reward/mean": 0.5})
    content = path.read_bytes()
    assert is_unchanged(tmp_path, written), "later lines do not count"
    for place in range(written.bytes):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_unchanged(tmp_path, written)
    path.write_bytes(content[: written.bytes - 1])
    assert not is_unchanged(tmp_path, written)
    path.unlink()
    assert not is_unchanged(tmp_path, written) and is_unchanged(
        tmp_path, MetricsLog(tmp_path / "new", keep_up_to_step=None).written
    )


def test_a_line_has_the_metrics_of_its_checkpoint() -> None:
    row = {"step": 1, "time": 1.0, "a": 0.5, "b": None, "memory/driver": 2.0}
    assert has_metrics(row, {"a": 0.5, "b": math.nan, "perf/step_seconds": 3.0})
    assert not has_metrics(row, {"a": 0.25}) and not has_metrics(row, {"c": None})


def test_a_new_run_refuses_the_metrics_of_another_run(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2))
    with pytest.raises(UserError, match="already holds"):
        MetricsLog(tmp_path, keep_up_to_step=None)
    assert steps_in(tmp_path) == [0, 1]


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = MetricsLog(tmp_path / "file" / "run", keep_up_to_step=None)
    with pytest.raises(UserError, match="cannot write"):
        log.write(1, {})


def test_a_folder_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_series_skips_missing_values_and_uses_the_last_line_of_a_step() -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 3, "b": 5}, {"step": 2, "a": 4}]
    assert series(rows, "a") == ([2], [4.0])
    assert series(rows, "none") == ([], [])
    assert metric_names([*rows, {"step": 4, "time": 1.0, "c": None, "d": math.nan}]) == ["a", "b"]


def read_tensorboard(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars("reward/mean")]


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4), tensorboard=True)
    assert read_tensorboard(tmp_path) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3)]


def test_tensorboard_hides_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4), tensorboard=True)
    # Real starts of a run differ in second or process. These do not, so the first file gets another name.
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.first"))
    write_steps(tmp_path, range(2, 3), tensorboard=True, keep_up_to_step=1)
    assert read_tensorboard(tmp_path) == [(0, 0.0), (1, 0.1), (2, 0.2)]


def test_a_failing_tensorboard_warns_once_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(3), tensorboard=True)
    assert len(caplog.records) == 1
    assert "training continues" in caplog.text
    assert steps_in(tmp_path) == [0, 1, 2]


def test_the_room_loads_no_deep_learning_library(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from megatron_rl.observability import make_view, record, report, summary
from megatron_rl.observability.sinks import open_sinks
from megatron_rl.config.observability import ObservabilitySettings
from megatron_rl.observability.metrics import MetricsLog
from megatron_rl.observability.sinks.tensorboard import TensorBoardSink
sink = TensorBoardSink(Path({str(tmp_path)!r}) / "tensorboard", None)
MetricsLog(Path({str(tmp_path)!r}), keep_up_to_step=None, sinks=[sink]).write(1, {{"a": 1.0}})
heavy = {{"torch", "tensorflow", "ray", "megatron", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list((tmp_path / "tensorboard").iterdir())
