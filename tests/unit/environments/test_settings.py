"""How a configuration names environments, and what is said if something is missing. No library is needed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import _cache_assets
from pydantic import ValidationError

from megatron_rl.agent.resolve import load_agent
from megatron_rl.config import load_config
from megatron_rl.config.agent import ENVIRONMENTS, AgentSettings
from megatron_rl.config.evaluation import TaskSettings
from megatron_rl.config.reward import RewardSettings
from megatron_rl.data import environments
from megatron_rl.data.environments import is_environment, write_tasks
from megatron_rl.data.hub import with_local_copies
from megatron_rl.data.rows import read_rows
from megatron_rl.errors import UserError
from megatron_rl.evaluation.protocol import load_protocol
from megatron_rl.reward import check_reward
from megatron_rl.utils.import_path import import_object

RUN = """\
model: {path: model}
rollout: {prompts_per_step: 1, samples_per_prompt: 2, max_response_tokens: 4}
reward: {name: math}
train: {steps: 1}
"""
LIBRARIES = ("reasoning_gym", "verifiers", "openenv", "harbor")


def numbers(name: str, settings: TaskSettings, held_out: bool) -> Iterator[dict[str, Any]]:
    """Tasks in the place of a library's: even numbers, or odd ones for evaluation."""
    if name == "none":
        raise UserError("there is no such task")
    for number in range(settings.size):
        problem = 2 * (number + settings.seed) + held_out * (name != "leaky")
        yield {"prompt": f"{name} {problem}", "label": "1"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, a library of tasks, and no other library."""
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setitem(environments.SOURCES, "harbor", f"{__name__}:numbers")
    monkeypatch.chdir(tmp_path)
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)


def configured(data: str, evaluation: str = "{}") -> Any:
    Path("run.yaml").write_text(f"{RUN}data: {data}\nevaluation: {evaluation}\n")
    return with_local_copies(load_config("run.yaml"))


def prompts_of(path: Path) -> list[str]:
    return [row["prompt"] for _, row in read_rows(path)]


@pytest.mark.parametrize(
    "function", ["verifiers", "harbor", "openenv:http://127.0.0.1:8000", "nemo-gym:https://a/b?policy=c:1"]
)
def test_an_agent_may_be_a_library(function: str) -> None:
    assert AgentSettings(function=function).library in ENVIRONMENTS


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("verifiers:gsm8k", "data.train names the environment, as verifiers:gsm8k"),
        ("harbor:", "harbor alone"),
        ("openenv", "openenv:URL, with the URL of the server"),
        ("nemo-gym:127.0.0.1:1", "nemo-gym:URL, with the URL of the server"),
        ("verifyers", "package.module:function, verifiers, harbor"),
        ("", "at least 1 character"),
    ],
)
def test_a_wrong_name_of_an_agent_says_what_is_right(function: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AgentSettings(function=function)


def test_names_of_environments_are_no_paths() -> None:
    assert is_environment(Path("reasoning-gym:chain_sum")) and is_environment(Path("harbor:/tasks/mine"))
    assert not any(map(is_environment, map(Path, ("verifiers", "train.jsonl", "owner/name:split", "gym:x"))))


def test_tasks_become_data_files_and_evaluation_has_others() -> None:
    config = configured("{train: 'harbor:a', tasks: {size: 3, seed: 5}}", "{suites: {s: 'harbor:a'}}")
    assert prompts_of(config.data.train) == ["a 10", "a 12", "a 14"]
    suite = config.evaluation.suites["s"]
    assert len(prompts_of(suite.data)) == 100 and prompts_of(suite.data)[:2] == ["a 1", "a 3"]
    assert (config.data.tasks, suite.tasks) == (None, None)  # the configuration of the run names files
    assert with_local_copies(config).data.train == config.data.train


def test_a_suite_with_a_problem_of_training_is_refused() -> None:
    message = "evaluation.suites.s: 2 of its 2 problems are also in data.train"
    with pytest.raises(UserError, match=message):
        configured("{train: 'harbor:leaky'}", "{suites: {s: {data: 'harbor:leaky', tasks: {size: 2}}}}")
    Path("own.jsonl").write_text(json.dumps({"prompt": "a 4", "label": "1"}) + "\n")
    with pytest.raises(UserError, match=r"evaluation\.suites\.own: 1 of its 1"):
        configured("{train: 'harbor:a'}", "{suites: {own: own.jsonl}}")


def test_errors_name_the_key() -> None:
    with pytest.raises(UserError, match=r"^data\.train: harbor:none: there is no such task$"):
        configured("{train: 'harbor:none'}")
    with pytest.raises(UserError, match=r"evaluation\.suites\.s: own\.jsonl is no environment"):
        Path("own.jsonl").write_text(json.dumps({"prompt": "a", "label": "1"}) + "\n")
        configured("{train: 'harbor:a'}", "{suites: {s: {data: own.jsonl, tasks: {size: 2}}}}")
    with pytest.raises(UserError, match=r"tasks\.size"):
        configured("{train: 'harbor:a', tasks: {size: 0}}")


def test_a_suite_that_does_not_say_how_many_has_100_problems() -> None:
    config = configured("{train: 'harbor:a'}", "{suites: {s: {data: 'harbor:a', tasks: {seed: 3}}}}")
    assert len(prompts_of(config.data.train)) == 1000
    found = prompts_of(config.evaluation.suites["s"].data)
    assert len(found) == 100 and found[0] == "a 7"


def test_suite_files_name_environments_too() -> None:
    Path("suites.yaml").write_text("reward: {name: math}\nsuites: {s: {data: 'harbor:a', tasks: {size: 2}}}\n")
    assert prompts_of(load_protocol("suites.yaml").suites["s"].data) == ["a 1", "a 3"]


def test_a_missing_package_is_an_error_that_names_it() -> None:
    for path, package in (("reasoning-gym:chain_sum", "reasoning-gym"), ("verifiers:x", "verifiers")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            write_tasks(Path(path), "data.train", "train", None)
    for function in ("verifiers", "harbor", "openenv:http://127.0.0.1:1"):
        with pytest.raises(UserError, match=f"pip install {function.partition(':')[0]}"):
            load_agent(AgentSettings(function=function))
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        check_reward(RewardSettings(name="reasoning-gym"))


def test_a_label_of_other_data_is_refused_before_a_run() -> None:
    read_label = import_object("megatron_rl.environments.reasoning_gym:read_label", "key")
    for label in ("42", None, {"task": "chain_sum"}):
        with pytest.raises(ValueError, match="names no problem of reasoning-gym"):
            read_label(label)
