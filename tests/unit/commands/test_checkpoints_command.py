from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.checkpoint.manifest import MANIFEST
from megatron_rl.cli import main
from tests.unit.checkpoint.conftest import FILES, Saving


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "300")
    saving = Saving(tmp_path / "checkpoints")
    for step in (5, 10, 15):
        saving.save(step, **{"eval/held_out/avg@8": step / 100, "eval/held_out/entropy": 1.0})
    return tmp_path


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """By the number of the step."""
    return {line.split("step_")[1][:6]: line for line in capsys.readouterr().out.splitlines() if "step_" in line}


def test_every_checkpoint_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run)]) == 0
    listed = lines(capsys)
    assert list(listed) == ["000005", "000010", "000015"]
    assert all("complete" in line and "one rank" in line for line in listed.values())
    assert "held_out/avg@8 0.100" in listed["000010"] and "entropy" not in listed["000010"]
    assert ["(latest)" in line for line in listed.values()] == [False, False, True]


def test_damage_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run / "checkpoints" / name / next(iter(FILES)) for name in ("step_000005", "step_000010"))
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    (run / "checkpoints/step_000015" / MANIFEST).write_text("{")
    main(["checkpoints", str(run)])
    quick = lines(capsys)
    assert f"DAMAGED: checkpoint file {first}" in quick["000005"]
    assert "complete" in quick["000010"]  # as long as it was
    assert "DAMAGED" in quick["000015"] and MANIFEST in quick["000015"]
    main(["checkpoints", str(run), "--verify"])
    thorough = lines(capsys)
    assert "DAMAGED" in thorough["000010"] and "SHA-256" in thorough["000010"]


def test_a_folder_without_checkpoints_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert f"{tmp_path}: no checkpoint" in capsys.readouterr().err
