"""`megatron_rl.train`, with a stand-in for the run itself; `tests/e2e_cpu/test_python.py` has a real one."""

from __future__ import annotations

import json
import subprocess
import sys
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import megatron_rl
from megatron_rl import Config, UserError, load_config, train

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart/countdown.yaml"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each run writes two lines of metrics and an export. Returns what a run sees."""
    seen: list[dict[str, Any]] = []

    def run(config: Config) -> None:
        seen.append({"config": config, "spawn": get_preparation_data("worker")})
        (config.run.folder / "hf").mkdir(parents=True)
        rows = [{"step": step, "time": 1.0, "train/loss": 0.5} for step in (0, 3)]
        (config.run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    stand_in = ModuleType("megatron_rl.loop")
    stand_in.train = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_rl.loop", stand_in)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return seen


def test_paths_are_text_and_the_result_is_an_object(runs: list[dict[str, Any]]) -> None:
    result = train(str(EXAMPLE), ["run.name=mine", "train.steps=3"])
    assert (result.folder, result.steps, result.export) == (Path("runs/mine"), 3, Path("runs/mine/hf"))
    assert result.metrics[-1]["train/loss"] == 0.5 and result.report is None
    assert runs[0]["config"].train.steps == 3


def test_a_configuration_may_be_loaded_before(runs: list[dict[str, Any]]) -> None:
    config = load_config(str(EXAMPLE), ["run.name=mine"])
    train(config)
    assert runs[0]["config"] == config
    with pytest.raises(ValueError, match="give those of a Config to load_config"):
        train(config, ["train.steps=3"])
    with pytest.raises(UserError, match=r"unknown key train\.stepz"):
        train(EXAMPLE, ["train.stepz=3"])


def test_new_processes_of_a_run_do_not_import_the_script(
    runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    main.__file__ = "script.py"
    monkeypatch.setitem(sys.modules, "__main__", main)
    train(EXAMPLE, ["run.name=mine"])
    assert not any(key.startswith("init_main") for key in runs[0]["spawn"])
    assert any(key.startswith("init_main") for key in get_preparation_data("worker"))
    assert sys.modules["__main__"] is main


def test_settings_without_effect_are_warned_of(runs: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    train(EXAMPLE, ["run.name=mine", "algorithm.name=grpo"])
    out, err = capsys.readouterr()
    assert out == "mine: grpo, 200 steps, starting\n"
    assert "warning: file" in err and "algorithm.lp_reg.rho has no effect" in err


def test_every_public_name_is_there_and_needs_no_torch() -> None:
    program = (
        "import sys, megatron_rl\n"
        "print([getattr(megatron_rl, name).__name__ for name in megatron_rl.__all__], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"{sorted(megatron_rl.__all__)} False", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        megatron_rl.trian  # noqa: B018
