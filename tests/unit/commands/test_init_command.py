"""`megatron-rl init`: what it writes loads, and can be planned without the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.cli import main
from megatron_rl.commands.init import examples, starting_points
from megatron_rl.config import load_config

Output = pytest.CaptureFixture[str]
TASKS = ("quickstart", "agents")
"""Starting points whose model the run makes itself."""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_name_all_are_listed(capsys: Output) -> None:
    assert main(["init"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"quickstart", "own_data", "qwen3-14b/lp_reg_paper_on", "qwen2.5-32b/grpo_off"} <= set(listed)
    assert not any(name.endswith("base") or name == "paper" for name in listed)


@pytest.mark.parametrize("name", sorted(starting_points()))
def test_a_copy_is_the_same_configuration(name: str, empty_folder: Path, capsys: Output) -> None:
    assert main(["init", name, "--output", "mine"]) == 0
    written = Path(capsys.readouterr().out.splitlines()[0])
    assert written.is_relative_to("mine")
    naming = ["run.name=same", "run.folder=same"]
    assert load_config(written, naming) == load_config(starting_points()[name], naming)


def test_a_start_with_scripts_keeps_the_places_that_imports_name(capsys: Output) -> None:
    assert main(["init", "quickstart/demonstration"]) == 0
    assert capsys.readouterr().out.endswith("next: python examples/quickstart/demonstration.py\n")
    code = {path.name for path in Path("examples/quickstart").glob("*.py")}
    assert code == {path.name for path in (examples() / "quickstart").glob("*.py")}
    assert main(["init", "smollm2/lp_reg"]) == 0
    assert "\nexamples/smollm2/prepare.py\n" in capsys.readouterr().out


PLANNED = sorted(name for name in starting_points() if name == "own_data" or name.startswith("qwen"))


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_of_a_start_needs_no_model(name: str, capsys: Output) -> None:
    assert main(["init", name]) == 0
    written = capsys.readouterr().out.splitlines()[0]
    assert main(["plan", written, "--json"]) == 0
    assert "uses the published sizes of Qwen" in capsys.readouterr().err


def test_the_module_of_an_agent_is_copied_to_where_it_is_imported_from(capsys: Output) -> None:
    assert main(["init", "agents/calculator", "--output", "mine"]) == 0
    configuration, module, after = capsys.readouterr().out.splitlines()
    assert Path(configuration) == Path("mine/examples/agents/calculator.yaml")
    assert after == "next: cd mine && megatron-rl train examples/agents/calculator.yaml"
    function = load_config(Path(configuration), []).rollout.agent.function
    assert Path(module) == Path("mine", f"{function.partition(':')[0].replace('.', '/')}.py")
    assert Path(module).read_text() == (examples() / "agents/countdown.py").read_text()


def test_the_module_of_an_environment_is_found_by_the_next_command(capsys: Output) -> None:
    assert main(["init", "environments/higher_lower"]) == 0
    assert Path("examples/environments/higher_lower.py").is_file()
    train = "megatron-rl train examples/environments/higher_lower.yaml --dry-run"
    assert capsys.readouterr().out.endswith(f"next: PYTHONPATH=examples/environments {train}\n")


def test_a_file_of_ones_own_is_never_overwritten(empty_folder: Path, capsys: Output) -> None:
    (empty_folder / "paper.yaml").write_text("seed: 1\n")
    assert main(["init", "qwen3-14b/grpo_on"]) == 2
    assert "paper.yaml exists already" in capsys.readouterr().err
    assert [path.name for path in empty_folder.iterdir()] == ["paper.yaml"]
    assert main(["init", "own_data"]) == 0
    assert main(["init", "own_data"]) == 0  # the same file again


def test_an_unknown_name_gets_the_nearest(capsys: Output) -> None:
    assert main(["init", "qwen3-14b/lp_reg_paper"]) == 2
    assert "did you mean qwen3-14b/lp_reg_paper_o" in capsys.readouterr().err


def test_a_name_like_no_other_gets_a_whole_sentence(capsys: Output) -> None:
    assert main(["init", "zzz"]) == 2
    assert "named zzz. `megatron-rl init` lists all names" in capsys.readouterr().err


def test_comments_are_kept(capsys: Output) -> None:
    assert main(["init", "qwen3-14b/grpo_on"]) == 0
    assert Path("paper.yaml").read_bytes() == (examples() / "recipes/paper.yaml").read_bytes()
