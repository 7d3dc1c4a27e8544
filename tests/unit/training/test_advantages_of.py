"""From rewards to advantages: the configured estimator, after the overlong penalty."""

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
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.batch import TrainingBatch, training_batch
from megatron_rl.types import Prompt, Response, RewardResult

PROMPT = Prompt("p", (1,), "", None)
REWARDS, GROUPS, LENGTHS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 0, 2, 2, 2], [10, 2, 3, 6, 8, 9]


def group(number: int) -> Group:
    """A group with as many tool tokens at its responses' ends as `number` says."""
    rows = [row for row, of in enumerate(GROUPS) if of == number]
    masks = [[True] * LENGTHS[row] + [False] * number for row in rows]
    return Group(
        number,
        number,
        PROMPT,
        since=0,
        responses=tuple(Response([1] * len(mask), [0.0] * len(mask), "stop", 0, sampled_mask=mask) for mask in masks),
        rewards=tuple(RewardResult(REWARDS[row]) for row in rows),
    )


def rollouts() -> Rollouts:
    """Three groups, of which the second is not trained on."""
    left_out = Group(1, 1, PROMPT, 0, (Response([1], [0.0], "stop", 0),), (RewardResult(1.0),))
    return Rollouts([group(0), left_out, group(2)], np.array([True, False, True]), weight_version=0)


def batch_of(**algorithm: Any) -> tuple[TrainingBatch, dict[str, float]]:
    settings = AlgorithmSettings.model_validate(algorithm)
    config: Any = SimpleNamespace(
        algorithm=settings, rollout=SimpleNamespace(max_response_tokens=10), keeps_requests=False
    )
    return training_batch(config, rollouts(), lambda results: [result.score for result in results])


BY_HAND = {
    "grpo": np.array([2, -1, -1, 1, 1, -2]) / 3 / np.sqrt(1 / 3),
    "dr_grpo": np.array([2, -1, -1, 1, 1, -2]) / 3,
    "rloo": np.array([1, -0.5, -0.5, 0.5, 0.5, -1]),
    "maxrl": np.array([2, -1, -1, 0.5, 0.5, -1]),
    "reinforce_plus_plus": np.array([1, -1, -1, 1, 1, -1]) / 2 / np.sqrt(0.3),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_of_the_configuration(estimator: str) -> None:
    batch, metrics = batch_of(advantage=estimator)
    np.testing.assert_allclose(batch.advantages, BY_HAND[estimator], rtol=1e-5)
    assert metrics == {} and batch.advantages.dtype == np.float64


def test_a_batch_holds_the_groups_to_train_on_with_an_advantage_per_sampled_token() -> None:
    batch, _ = batch_of(advantage="dr_grpo")
    assert batch.groups.tolist() == GROUPS and batch.sequences.sampled_lengths.tolist() == LENGTHS
    assert batch.sequences.lengths.tolist() == [1 + n + g for n, g in zip(LENGTHS, GROUPS, strict=True)]
    per_token = batch.sequences.values["advantages"]
    assert per_token.dtype == np.float32
    np.testing.assert_array_equal(per_token, np.repeat(batch.advantages, LENGTHS).astype(np.float32))


def test_the_reward_is_shaped_before_the_advantages() -> None:
    config: Any = SimpleNamespace(algorithm=AlgorithmSettings(advantage="dr_grpo"), rollout=None, keeps_requests=False)
    shaped, _ = training_batch(config, rollouts(), lambda results: [1.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(shaped.advantages, [0.5, -0.5, 0, 0, 0, 0], atol=1e-12)


def test_overlong_responses_lose_reward_before_the_advantages() -> None:
    """Only sampled tokens count as length."""
    batch, metrics = batch_of(advantage="dr_grpo", overlong={"buffer_tokens": 4, "penalty": 0.5})
    rewards = np.array(REWARDS) - 0.5 * np.array([1, 0, 0, 0, 0.5, 0.75])
    want = np.concatenate([part - part.mean() for part in (rewards[:3], rewards[3:])])
    np.testing.assert_allclose(batch.advantages, want, atol=1e-12)
    assert metrics == {"reward/overlong_penalty": pytest.approx(-0.5 * 2.25 / 6)}


def test_fresh_tokens_are_those_that_the_weights_in_training_sampled() -> None:
    prompt = Prompt("p:0", (1,), "", None)
    continued = Response([5, 6, 7], [0.0] * 3, "stop", 3, ((2, 4),))
    with_tool = Response([5, 8, 8, 6], [0.0] * 4, "stop", 4, sampled_mask=[True, False, False, True])
    groups = [
        Group(number, number, prompt, 4, (response,), (RewardResult(0.0),))
        for number, response in enumerate([continued, with_tool, with_tool])
    ]
    config: Any = SimpleNamespace(algorithm=AlgorithmSettings(), rollout=None, keeps_requests=False)
    for version, fresh in ((4, [False, False, True, True, True]), (None, [False] * 5)):
        step = Rollouts(groups, np.array([True, False, True]), weight_version=version)
        batch, _ = training_batch(config, step, lambda results: [0.0] * len(results))
        assert batch.fresh.tolist() == fresh


def test_an_estimator_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_advantages.py").write_text(
        "def centred(r, g): return r - 0.5\n\ndef wrong(r, g): return r[:1]\n\ndef fails(r, g): return r / None\n"
    )
    batch, _ = batch_of(advantage="own_advantages:centred")
    assert batch.advantages.tolist() == [reward - 0.5 for reward in REWARDS]
    with pytest.raises(UserError, match=r"algorithm\.advantage='own_advantages:wrong': the estimator must return"):
        batch_of(advantage="own_advantages:wrong")
    words = r"algorithm\.advantage='own_advantages:fails': TypeError in .*own_advantages\.py, line 5: unsupported"
    with pytest.raises(UserError, match=words):
        batch_of(advantage="own_advantages:fails")
    with pytest.raises(UserError, match=r"algorithm\.advantage='own_advantages:absent'.* has no 'absent'"):
        batch_of(advantage="own_advantages:absent")
