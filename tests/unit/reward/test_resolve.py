"""Tests of reward names: built-in, custom and wrong ones."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron_rl.config.reward import RewardSettings
from megatron_rl.errors import UserError
from megatron_rl.reward import load_reward
from megatron_rl.reward.countdown import verify_countdown
from megatron_rl.reward.maths import MathsReward
from megatron_rl.types import Reward


def named(name: str) -> Reward:
    return load_reward(RewardSettings.model_construct(name=name))


def test_built_in_rewards_are_found_by_name() -> None:
    assert named("countdown") is verify_countdown
    assert isinstance(named("math"), MathsReward)


def test_a_custom_reward_is_found_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_here.py").write_text("def score(sample): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    assert named("my_reward_here:score").__name__ == "score"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package.rewards:score", "No module named 'no_such_package'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "'pi' is a float, not a function"),
    ],
)
def test_a_path_that_names_no_verifier_is_an_error(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        named(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("countdwon", "did you mean countdown?"),
        ("maths", "did you mean math?"),
        ("zzz", "one of countdown, math, code, agent, reasoning-gym, remote, or package.module:function"),
        ("", "package.module:function"),
        ("math:", "package.module:function"),
        (":score", "package.module:function"),
    ],
)
def test_a_name_that_is_neither_known_nor_an_import_path_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RewardSettings(name=name)
    assert words in str(caught.value)


def test_a_module_that_fails_to_import_is_an_error_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_broken_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"my_broken_reward.*ZeroDivisionError: division by zero"):
        named("my_broken_reward:score")
