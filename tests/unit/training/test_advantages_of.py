"""From rewards to advantages: the estimator asked for, after the overlong penalty."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpreg.advantages import ESTIMATORS
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.collector import Rollouts
from megatron_rl.training.advantages import advantages_of
from megatron_rl.types import Generation, Prompt, Sample

PROMPT = Prompt("p", (1,), "", None)
REWARDS, GROUPS, LENGTHS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [2, 2, 2, 5, 5, 5], [10, 2, 3, 6, 8, 9]


def rollouts() -> Rollouts:
    samples = [
        Sample(PROMPT, group, Generation([1] * length, [0.0] * length, "stop", 0), "")
        for group, length in zip(GROUPS, LENGTHS, strict=True)
    ]
    return Rollouts(drawn=samples, rewards=REWARDS, groups=[2, 5])


def config(**algorithm: Any) -> Any:
    settings = AlgorithmSettings.model_validate(algorithm)
    return SimpleNamespace(algorithm=settings, rollout=SimpleNamespace(max_response_tokens=10))


BY_HAND = {
    "grpo": np.array([2, -1, -1, 1, 1, -2]) / 3 / np.sqrt(1 / 3),
    "dr_grpo": np.array([2, -1, -1, 1, 1, -2]) / 3,
    "rloo": np.array([1, -0.5, -0.5, 0.5, 0.5, -1]),
    "reinforce_plus_plus": np.array([1, -1, -1, 1, 1, -1]) / 2 / np.sqrt(0.3),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_of_the_configuration(estimator: str) -> None:
    found, metrics = advantages_of(config(advantage=estimator), rollouts())
    np.testing.assert_allclose(found, BY_HAND[estimator], rtol=1e-5)
    assert metrics == {} and found.dtype == np.float64


def test_responses_that_ran_on_lose_reward_before_there_are_advantages() -> None:
    found, metrics = advantages_of(
        config(advantage="dr_grpo", overlong={"buffer_tokens": 4, "penalty": 0.5}), rollouts()
    )
    rewards = np.array(REWARDS) - 0.5 * np.array([1, 0, 0, 0, 0.5, 0.75])
    want = np.concatenate([part - part.mean() for part in (rewards[:3], rewards[3:])])
    np.testing.assert_allclose(found, want, atol=1e-12)
    assert metrics == {"reward/overlong_penalty": pytest.approx(-0.5 * 2.25 / 6)}


def test_an_estimator_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_advantages.py").write_text("def centred(r, g): return r - 0.5\n\ndef wrong(r, g): return r[:1]\n")
    found, _ = advantages_of(config(advantage="own_advantages:centred"), rollouts())
    assert found.tolist() == [reward - 0.5 for reward in REWARDS]
    with pytest.raises(UserError, match=r"algorithm\.advantage='own_advantages:wrong': the estimator must return"):
        advantages_of(config(advantage="own_advantages:wrong"), rollouts())
    with pytest.raises(UserError, match=r"algorithm\.advantage='own_advantages:absent'.* has no 'absent'"):
        advantages_of(config(advantage="own_advantages:absent"), rollouts())
