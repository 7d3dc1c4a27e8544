"""`--output` writes to a file what a command prints, or names the place of what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cli import main
from megatron_rl.conversion import convert
from tests.unit.checkpoint.conftest import Saving

RECIPE = "examples/recipes/qwen3-14b/lp_reg_reference_on.yaml"


def test_a_plan_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--json"]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "new" / "plan.json"
    assert main(["plan", RECIPE, "--json", "--output", str(file)]) == 0
    assert file.read_text() == printed and json.loads(printed)
    assert capsys.readouterr().out == f"{file}\n"


def test_a_list_of_checkpoints_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Saving(tmp_path / "checkpoints").save(5)
    file = tmp_path / "list.txt"
    assert main(["checkpoints", str(tmp_path), "--output", str(file)]) == 0
    assert "step_000005" in file.read_text() and capsys.readouterr().out == f"{file}\n"
    assert main(["checkpoints", str(tmp_path / "checkpoints"), "--output", str(file)]) == 2
    assert "step_000005" in file.read_text()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--output", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}" in capsys.readouterr().err


def test_what_doctor_finds_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "doctor.txt"
    main(["doctor", "--quick", "--output", str(file)])
    assert "Python" in file.read_text()


@pytest.mark.parametrize(
    "arguments",
    [["source", "out"], ["source", "--format", "hf", "out"], ["source", "--output", "out"], ["--output=out", "source"]],
)
def test_convert_takes_its_target_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(convert, "convert", lambda source, target, **_: called.append((source, target)))
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    assert main(["convert", *arguments]) == 0
    assert [(source.name, target) for source, target in called] == [("source", Path("out"))]


def test_convert_takes_one_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), "a", "--output", "b"]) == 2
    assert "two targets" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path)])
