from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_rl
from megatron_rl.cli import main
from megatron_rl.config import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart" / "countdown.yaml"

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str) -> int:
    return main(["train", str(EXAMPLE), *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", str(EXAMPLE), "--dry-run"]])
def test_torch_is_not_loaded_before_it_is_needed(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from megatron_rl.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'ray', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_and_the_configuration_on_request_write_nothing(empty_folder: Path, capsys: Output) -> None:
    assert train("--dry-run") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{EXAMPLE}: nothing wrong found" in err and "# forwards without gradient: " in err
    assert train("--show-config") == 0
    assert list(empty_folder.iterdir()) == []
    out = capsys.readouterr().out
    (empty_folder / "expanded.yaml").write_text(out)
    expanded = load_config(empty_folder / "expanded.yaml", [])
    assert expanded == load_config(EXAMPLE, [f"run.name={expanded.run.name}"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.steps=7", "seed=5", "--show-config"],
        ["--show-config", "train.steps=7", "seed=5"],
        ["train.steps=7", "--show-config", "seed=5"],
        ["train.steps=6", "--show-config", "seed=5", "train.steps=7"],
    ],
)
def test_options_and_overrides_may_come_in_any_order(arguments: list[str], capsys: Output) -> None:
    assert train(*arguments) == 0
    out = capsys.readouterr().out
    assert "\n  steps: 7  # override\n" in out and "\nseed: 5  # override\n" in out


def test_an_unknown_key_is_an_error_with_a_suggestion(empty_folder: Path, capsys: Output) -> None:
    assert train("train.stepz=3") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "train.stepz" in err and "did you mean train.steps?" in err
    assert "Traceback" not in err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], "missing.yaml: no such configuration file"),
        (["train", "missing.yaml", "--dry-run"], "missing.yaml: no such configuration file"),
        (["train", str(EXAMPLE), "--dry-run", "data.train=gone.jsonl"], "data.train: no such file: "),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_user_errors_are_messages_without_a_traceback(arguments: list[str], words: str, capsys: Output) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tran"],
        ["train"],
        ["report"],
        ["train", str(EXAMPLE), "--dryrun"],
        ["train", str(EXAMPLE), "--dry-run", "seed=1", "--wat"],
    ],
)
def test_an_invalid_command_line_exits_with_status_2(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_an_interrupt_prints_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_rl.api.load_config", interrupt)
    assert train() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_module_runs_as_the_installed_command() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_rl.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: megatron-rl")


def test_the_first_line_comes_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    """Importing torch takes seconds, in which a user would see nothing."""
    printed: list[str] = []
    stand_in = ModuleType("megatron_rl.loop")
    stand_in.__getattr__ = lambda name: printed.append(capsys.readouterr().out) or (lambda config: None)  # type: ignore
    monkeypatch.setitem(sys.modules, "megatron_rl.loop", stand_in)
    assert train("run.name=mine") == 0
    assert printed[0] == "mine: lp_reg, 200 steps, starting\n"


def test_the_package_runs_as_the_installed_command() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_rl", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"megatron-rl {megatron_rl.__version__}\n")


def test_an_error_stands_alone(empty_folder: Path, capsys: Output) -> None:
    assert train("--dry-run", "data.train=gone.jsonl") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: data.train: no such file: gone.jsonl")


def test_a_report_on_a_folder_without_a_run_is_an_error(empty_folder: Path, capsys: Output) -> None:
    (empty_folder / "notes").mkdir()
    assert main(["report", "notes"]) == 2
    assert "notes: holds no run" in capsys.readouterr().err
    assert list((empty_folder / "notes").iterdir()) == []


def test_every_command_that_writes_a_file_has_the_option_output(capsys: Output) -> None:
    for command in (["init"], ["report"], ["slurm"], ["eval"], ["data", "prepare"], ["push"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert "--output" in capsys.readouterr().out, command


def test_settings_of_another_method_in_the_file_are_a_warning(capsys: Output) -> None:
    assert train("--dry-run", "algorithm.name=grpo") == 0
    err = capsys.readouterr().err
    assert "warning: file" in err and "algorithm.lp_reg.rho has no effect: it is a setting of lp_reg" in err


def test_the_plan_of_one_node_says_node(capsys: Output) -> None:
    assert main(["plan", str(EXAMPLE.parents[1] / "own_data.yaml")]) == 0
    out, err = capsys.readouterr()
    assert " on 1 node\n" in out and "uses the published sizes of Qwen3-0.6B" in err


def test_a_folder_of_another_user_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def locked(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.stat", locked)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: permission denied for this user\n"
