"""State, driver's log and `status` of a run in progress, stopped, killed and finished."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.errors import UserError
from megatron_rl.observability.state import LOG, KeptView, progress, read_state, seconds_left
from megatron_rl.observability.view import View


def kept(folder: Path, total: int = 10) -> KeptView:
    folder.mkdir(exist_ok=True)
    return KeptView(View(), folder, total, "a run")


def ended(folder: Path) -> str:
    state = read_state(folder)
    assert state is not None and state.ended is not None
    return state.ended


def test_a_run_in_progress_has_phase_and_a_finished_one_how_it_ended(tmp_path: Path) -> None:
    with kept(tmp_path) as view:
        view.open()
        view.phase("rollout")
        state = read_state(tmp_path)
        assert state is not None and (state.phase, state.ended, state.total_steps) == ("rollout", None, 10)
        view.step(10, {"reward/mean": 0.5})
    assert ended(tmp_path) == "finished after step 10 of 10"


def test_stops_interrupts_and_errors_are_told_apart_and_logged(tmp_path: Path) -> None:
    with kept(tmp_path / "stopped") as view:
        view.open()
        view.step(3, {})
    assert ended(tmp_path / "stopped") == "stopped after step 3 of 10, with a checkpoint"
    with pytest.raises(KeyboardInterrupt), kept(tmp_path / "interrupted") as view:
        view.open()
        raise KeyboardInterrupt
    assert ended(tmp_path / "interrupted").startswith("interrupted after step 0 of 10")
    with pytest.raises(UserError), kept(tmp_path / "error") as view:
        view.open()
        raise UserError("the disk is full\nand more")
    assert ended(tmp_path / "error") == "ended by an error after step 0 of 10: UserError: the disk is full"
    assert "Traceback" in (tmp_path / "error" / LOG).read_text()


@pytest.mark.parametrize("text", ['{"total_st', "[]", "{}", '{"total_steps": "many"}', "\xff"])
def test_the_status_of_a_broken_state_names_the_file(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.json").write_text(text, encoding="latin-1")
    assert main(["status", str(tmp_path)]) == 2
    assert f"{tmp_path / 'state.json'}: not the state of a run" in capsys.readouterr().err


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    with kept(tmp_path) as view:
        view.open()
    path = tmp_path / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"new": 1}))
    assert ended(tmp_path).startswith("stopped")


def test_nothing_is_written_before_the_folder_is_opened(tmp_path: Path) -> None:
    """Until then the folder may belong to another run."""
    with pytest.raises(UserError), kept(tmp_path) as view:
        view.phase("loading data")
        raise UserError("not ours")
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_recognised_by_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with kept(tmp_path) as view:
        view.open()
        view.phase("train")
        text = (tmp_path / "state.json").read_text()
    (tmp_path / "state.json").write_text(json.dumps(json.loads(text) | {"pid": process.pid}))
    assert ended(tmp_path) == f"killed in the phase 'train': its process {process.pid} has vanished"
    (tmp_path / "state.json").write_text(json.dumps(json.loads(text) | {"pid": process.pid, "host": "another"}))
    state = read_state(tmp_path)
    assert state is not None and state.ended is None, "a process of another machine cannot be looked for"


def test_a_changed_byte_anywhere_in_the_state_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Harmless is only a change of the lines that hold the SHA-256 of the rest."""
    with kept(tmp_path) as view:
        view.open()
        view.phase("train")
        path = tmp_path / "state.json"
        content, state = path.read_bytes(), read_state(tmp_path)
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            try:
                assert read_state(tmp_path) == state and place >= content.rfind(b',\n "sha256"'), place
            except UserError as error:
                assert str(path) in str(error)
        fields = json.loads(content)
        assert fields.pop("sha256")
        path.write_text(json.dumps(fields))
        assert read_state(tmp_path) == state, "a file of an earlier version has no SHA-256"


def test_the_drivers_log_has_messages_phases_steps_and_warnings_with_times(tmp_path: Path) -> None:
    with kept(tmp_path) as view:
        view.open()
        view.phase("rollout")
        view.step(1, {"reward/mean": 0.25})
        view.eval(1, {"eval/a/avg@8": 0.5})
        view.message("a message")
        logging.getLogger("some.library").warning("look here")
    lines = (tmp_path / LOG).read_text().splitlines()
    assert all(line[:4].isdecimal() and line[4] == "-" for line in lines)
    text = "\n".join(lines)
    for part in (
        "phase=rollout",
        "reward=0.250",
        "suite=a avg@8=0.500",
        "a message",
        "WARNING some.library: look here",
    ):
        assert part in text
    logging.getLogger("some.library").warning("later")
    assert "later" not in (tmp_path / LOG).read_text()


def test_the_time_left_comes_from_the_last_steps() -> None:
    rows = [{"step": step, "time": 100.0 + 2 * step} for step in range(1, 6)]
    assert seconds_left(rows, 10, now=110.0) == pytest.approx(10.0)
    assert seconds_left(rows, 10, now=113.0) == pytest.approx(7.0)
    assert seconds_left(rows[:1], 10, now=110.0) is None


def test_status_shows_step_reward_phase_and_time_left_and_then_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    rows = [{"step": step, "time": now - 40 + 10 * step, "reward/mean": 0.1 * step} for step in range(1, 5)]
    with kept(tmp_path) as view:
        view.open()
        view.phase("train")
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        facts = dict(progress(tmp_path, now))
        assert facts["step"] == "4 of 10" and facts["reward"] == "0.250 (mean of the last 4 steps)"
        assert facts["phase"].startswith("train, for 0 s") and facts["left"] == "1 min 00 s"
        assert main(["status", str(tmp_path)]) == 0
        assert "step    4 of 10" in capsys.readouterr().out
        view.step(4, {})
    assert main(["status", str(tmp_path)]) == 0
    assert "stopped after step 4 of 10, with a checkpoint" in capsys.readouterr().out


def test_status_of_a_folder_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "no run here" in capsys.readouterr().err
