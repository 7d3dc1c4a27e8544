"""The examples of environments are configurations, and their environment is a module that Python can read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.config.agent import ENVIRONMENTS
from megatron_rl.data.environments import is_environment

EXAMPLES = sorted((Path(__file__).parents[3] / "examples/environments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_configuration_of_an_environment(path: Path) -> None:
    config = load_config(path)
    assert is_environment(config.data.train) and config.data.tasks
    assert all(is_environment(suite.data) for suite in config.evaluation.suites.values())
    library, _, name = str(config.data.train).partition(":")
    if config.rollout.agent:
        assert config.rollout.agent.function == library and library in ENVIRONMENTS
        module = ast.parse((path.parent / f"{name}.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(module)
    else:
        assert config.reward.name == library


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["chain_sum", "higher_lower", "tiny_guess", "tiny_sums"]
