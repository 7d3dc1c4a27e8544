from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.checkpoint.manifest import MANIFEST
from megatron_rl.cli import main
from tests.unit.checkpoint.conftest import FILES, Saving


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "80")
    saving = Saving(tmp_path / "checkpoints")
    for step in (5, 10, 15):
        saving.save(step, **{"eval/held_out/avg@8": step / 100, "eval/held_out/entropy": 1.0})
    return tmp_path


def rows(output: str) -> dict[str, str]:
    """Returns the rows of the table by step number."""
    return {line.split("step_")[1][:6]: line for line in output.splitlines() if line.startswith("  step_")}


def test_every_checkpoint_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 0
    output = capsys.readouterr().out
    listed = rows(output)
    assert max(map(len, output.splitlines())) <= 80
    assert list(listed) == ["000005", "000010", "000015"]
    assert all("complete" in line for line in listed.values()) and "layout: one rank; sizes compared" in output
    assert "held_out/avg@8 0.100" in listed["000010"] and "entropy" not in listed["000010"]
    assert ["(latest)" in line for line in listed.values()] == [False, False, True]


def test_a_damaged_checkpoint_is_marked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run / "checkpoints" / name / next(iter(FILES)) for name in ("step_000005", "step_000010"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    (run / "checkpoints/step_000015" / MANIFEST).write_text("{")
    main(["checkpoints", str(run)])
    output = capsys.readouterr().out
    assert ["DAMAGED" in line for line in rows(output).values()] == [True, False, True]
    assert f"{first} is damaged" in output and MANIFEST in output and str(second) not in output  # its size is unchanged
    main(["checkpoints", str(run), "--verify"])
    output = capsys.readouterr().out
    assert ["DAMAGED" in line for line in rows(output).values()] == [True, True, True]
    assert f"{second} is damaged (wrong SHA-256)" in output


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert f"{tmp_path}: no checkpoint" in capsys.readouterr().err
