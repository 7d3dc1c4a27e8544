"""Samples without a reward: a step with them learns exactly what it learns without them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpreg import make_loss
from lpreg.advantages import ESTIMATORS
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.config.algorithm import AlgorithmSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.advantages import advantages_of, counted_responses
from megatron_rl.training.batch import TrainingBatch, training_batch
from megatron_rl.training.learner import Learner
from megatron_rl.training.metrics import policy_metrics, rollout_metrics
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select, selection_overlap
from megatron_rl.training.update import update
from megatron_rl.types import Outcome, Prompt, Response, RewardResult
from tests.unit.training.test_select_and_score import passes

NAN = float("nan")
Sampled = tuple[float, Outcome]
GROUPS: list[list[Sampled]] = [
    [(1.0, "score"), (7.0, "timeout"), (0.0, "score"), (0.0, "score")],
    [(-3.0, "error"), (0.0, "score"), (1.0, "score"), (NAN, "error")],
    [(1.0, "score"), (0.0, "score"), (1.0, "score"), (0.25, "score")],
    [(1.0, "score"), (1.0, "score"), (0.0, "timeout"), (1.0, "score")],
]
"""Score and outcome of each response. The scores of failed responses are garbage."""
TAUGHT_NOTHING: list[list[Sampled]] = [
    [(1.0, "score"), (0.0, "timeout"), (0.0, "error")],
    [(0.0, "timeout"), (0.0, "error")],
]
"""Groups with fewer than two rewards."""


def response(group: int, k: int, outcome: Outcome) -> Response:
    """A response of which the tokens tell where it belongs. A failed one has the rarest tokens of the step, whose
    log-probs may not even be numbers."""
    length = 2 + (group + 2 * k) % 4
    ids = 10 + np.arange(length) + 7 * k + 31 * group
    log_probs = -0.1 - (ids * 37 % 23) / 10
    if outcome != "score":
        ids, log_probs = ids + 500, np.full(length, NAN if k % 2 else -50.0)
    return Response(ids, log_probs, "stop", 0)


def rollouts_of(groups: list[list[Sampled]], *, only_scored: bool = False) -> Rollouts:
    made = []
    for number, group in enumerate(groups):
        kept = [(k, *sampled) for k, sampled in enumerate(group) if sampled[1] == "score" or not only_scored]
        made.append(
            Group(
                number,
                number,
                Prompt(f"p:{number}", (1, 2), "", None),
                0,
                tuple(response(number, k, outcome) for k, _, outcome in kept),
                tuple(RewardResult(score, outcome=outcome) for _, score, outcome in kept),
            )
        )
    return Rollouts(made, np.ones(len(made), dtype=bool), weight_version=0)


def batch_of(rollouts: Rollouts, **algorithm: Any) -> tuple[TrainingBatch, dict[str, float]]:
    settings = AlgorithmSettings.model_validate(algorithm)
    config: Any = SimpleNamespace(
        algorithm=settings, rollout=SimpleNamespace(max_response_tokens=6), keeps_requests=False
    )
    return training_batch(config, rollouts, lambda results: [result.score for result in results])


OWN = """
import torch

def whitened(rewards, groups):
    assert len(rewards) == len(groups) and rewards.isfinite().all()
    return (rewards - rewards.mean()) / (rewards.std() + 1e-3)

def minus_half(rewards, groups):
    return rewards - 0.5

def best(rewards, groups):
    return (rewards == rewards.max()).double()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_estimators", raising=False)
    Path("own_estimators.py").write_text(OWN)


EVERY = [*ESTIMATORS, *(f"own_estimators:{name}" for name in ("whitened", "minus_half", "best"))]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("advantage", "overlong"),
    [(name, buffer) for name in EVERY for buffer in (0, 4) if (name, buffer) != ("maxrl", 4)],  # no negative rewards
)
def test_every_advantage_is_that_of_a_step_without_the_failed_samples(advantage: str, overlong: int) -> None:
    settings: dict[str, Any] = {"advantage": advantage, "overlong": {"buffer_tokens": overlong, "penalty": 0.1}}
    batch, metrics = batch_of(rollouts_of([*GROUPS, *TAUGHT_NOTHING]), **settings)
    clean, clean_metrics = batch_of(rollouts_of(GROUPS, only_scored=True), **settings)
    assert np.array_equal(batch.advantages[batch.counted], clean.advantages)
    assert not batch.advantages[~batch.counted].any()
    per_token = batch.sequences.values["advantages"]
    assert not per_token[~batch.sequences.per_token(batch.counted)].any()
    assert clean.counted.all() and not batch.counted[-5:].any()
    if overlong:
        assert metrics.keys() == clean_metrics.keys() == {"reward/overlong_penalty"}


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=1, max_size=4), max_size=5),
    st.randoms(use_true_random=False),
)
def test_a_reward_counts_beside_another_one_of_its_group(groups: list[list[float]], random: Any) -> None:
    rows = [(number, reward) for number, group in enumerate(groups) for reward in group]
    random.shuffle(rows)
    counted = counted_responses(np.array([r for _, r in rows]), np.array([g for g, _ in rows], dtype=np.int64))
    for (number, reward), counts in zip(rows, counted.tolist(), strict=True):
        rewarded = sum(not np.isnan(other) for other in groups[number])
        assert counts is (not np.isnan(reward) and (rewarded > 1 or len(groups[number]) == 1))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("advantage", EVERY)
def test_a_step_in_which_everything_failed_has_no_advantage(advantage: str) -> None:
    """The estimator is not even called."""
    algorithm = AlgorithmSettings.model_validate({"advantage": advantage})
    assert advantages_of(algorithm, np.full(4, NAN), np.array([0, 0, 1, 1])).tolist() == [0.0] * 4
    assert advantages_of(algorithm, np.zeros(0), np.zeros(0, dtype=np.int64)).tolist() == []


def test_groups_of_one_response_learn_from_a_baseline_of_the_batch() -> None:
    algorithm = AlgorithmSettings.model_validate({"advantage": "reinforce_plus_plus"})
    found = advantages_of(algorithm, np.array([1.0, 0.0, NAN]), np.array([0, 1, 2]))
    assert found[0] > 0 > found[1] and found[2] == 0


def test_rewards_that_an_estimator_does_not_take_are_a_plain_error() -> None:
    algorithm = AlgorithmSettings.model_validate({"advantage": "maxrl"})
    with pytest.raises(UserError, match=r"algorithm\.advantage='maxrl': .* maxrl takes no negative rewards"):
        advantages_of(algorithm, np.array([1.0, -1.0]), np.array([0, 0]))
    assert advantages_of(algorithm, np.array([1.0, 0.0, NAN]), np.zeros(3, dtype=np.int64)).tolist() == [1, -1, 0]


# ---------------------------------------------------------------------- from the scores to the updates


class Actors:
    """Scores each token by its id and its place, and notes what each update trains."""

    def __init__(self) -> None:
        self.trained: list[tuple[Any, ...]] = []

    def _scores(self, batch: SequenceBatch) -> dict[str, Array]:
        log_probs = (-0.05 - (batch.targets * 53 % 29) / 8).astype(np.float32)
        entropy = ((batch.targets * 11 % 17) / 5).astype(np.float32)
        log_z = (-(batch.targets % 3) / 10).astype(np.float32)
        return {"log_probs": log_probs, "entropy": entropy, "log_z": log_z, "in_filter": batch.targets % 4 != 0}

    def score(self, batch: SequenceBatch, **_: Any) -> dict[str, Array]:
        return self._scores(batch)

    def score_and_store(self, batch: SequenceBatch, **_: Any) -> tuple[dict[str, Array], StoredProxy]:
        wanted = batch.values.get("proxy_wanted", np.zeros(batch.num_sampled_tokens, dtype=bool))
        ids = batch.targets[wanted].astype(np.int32)
        return self._scores(batch), StoredProxy(wanted.astype(np.int64), ids, -ids.astype(np.float32))

    def snapshot(self, name: str) -> None:
        pass

    def train(self, batch: SequenceBatch, *, denominator: int, **_: Any) -> Any:
        assert all(np.isfinite(values).all() for name, values in batch.values.items() if name != "proxy_log_probs")
        proxy = batch.proxy and (batch.proxy.counts.tolist(), batch.proxy.ids.tolist())
        values = {name: value.tolist() for name, value in batch.values.items()}
        self.trained.append((batch.token_ids.tolist(), batch.lengths.tolist(), values, proxy, denominator))
        metrics = {
            "ratio": (1.0, 1.0),
            "selected_fraction": (float(batch.values.get("selected", np.ones(1)).sum()), 1.0),
        }
        return SimpleNamespace(loss=1.0, grad_norm=1.0, values=self._scores(batch), metrics=metrics)


def learned(rollouts: Rollouts, name: str, updates: int, source: str, **settings: Any) -> tuple[Any, dict[str, float]]:
    """Returns everything that the updates of a step get, and the step's metrics."""
    actors, loss = Actors(), make_loss(name, **settings)
    train = SimpleNamespace(updates_per_rollout=updates, epochs_per_rollout=1, drop_zero_advantage=True)
    config: Any = SimpleNamespace(
        train=train, rollout=SimpleNamespace(temperature=1.0), algorithm=SimpleNamespace(proxy_refresh_steps=1)
    )
    needed = passes(loss, updates=updates, source=source, score_dropped=True, reference=True)
    learner = Learner(config, actors, loss, needed)  # type: ignore[arg-type]
    batch, metrics = batch_of(rollouts)
    batch = score_old_policy(learner, batch)
    batch, selected = select(learner, batch, 1)
    batch = score_reference(learner, score_lagged_policy(learner, 1, batch))
    batch, updated = update(learner, 1, batch, lr=0.1, seed=1)
    metrics |= selected | updated | selection_overlap(learner, batch)
    metrics |= policy_metrics(batch.sequences, batch.scores, batch.fresh)
    return actors.trained, metrics | rollout_metrics(rollouts, batch.advantages)


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lp_reg": ("lp_reg", {"rho": 0.2}),
    "lp_reg, lagged": ("lp_reg", {"rho": 0.3, "proxy_source": "lagged", "advantage_sign": "both"}),
    "lp_reg, full KL of every token": ("lp_reg", {"select_by": "all", "kl_estimator": "full", "proxy_source": "old"}),
    "grpo": ("grpo", {}),
    "grpo, mean over responses": ("grpo", {"aggregation": "sequence_mean_token_mean"}),
    "gspo": ("gspo", {}),
    "entropy_bonus": ("entropy_bonus", {}),
    "high_entropy": ("high_entropy", {"share": 0.3}),
    "kl_cov": ("kl_cov", {"share": 0.2}),
    "stapo": ("stapo", {}),
}


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("source", ["rollout", "actor"])
@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_of_a_step_without_the_failed_samples(method: str, source: str, updates: int) -> None:
    """Sequences, values, selection, stored proxies and denominators: whether the loss acts without advantage or not."""
    name, settings = METHODS[method]
    with_failures, metrics = learned(rollouts_of(GROUPS), name, updates, source, **settings)
    without, clean = learned(rollouts_of(GROUPS, only_scored=True), name, updates, source, **settings)
    assert with_failures == without and without
    for metric in ("train/loss", "lpreg/selected_fraction", "lpreg/delta", "lpreg/below_delta_fraction", "reward/mean"):
        assert metrics.get(metric) == clean.get(metric)
    assert clean["train/counted_fraction"] == 1.0
    assert metrics["train/counted_fraction"] == 12 / 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("error")
def test_a_step_in_which_everything_failed_changes_nothing(method: str) -> None:
    name, settings = METHODS[method]
    trained, metrics = learned(rollouts_of(TAUGHT_NOTHING), name, 1, "actor", **settings)
    assert trained == []
    assert metrics["train/updates"] == metrics["train/counted_fraction"] == 0


# ---------------------------------------------------------------------- metrics


def test_statistics_of_rewards_do_not_know_the_failed_samples() -> None:
    rollouts, clean = rollouts_of(GROUPS), rollouts_of(GROUPS, only_scored=True)
    found, want = (rollout_metrics(one, np.ones(len(one.responses))) for one in (rollouts, clean))
    assert (found["reward/mean"], found["reward/std"]) == (want["reward/mean"], want["reward/std"])
    assert found["response_length/mean"] != want["response_length/mean"], "their tokens were sampled all the same"


@pytest.mark.filterwarnings("error")
def test_without_any_reward_there_is_no_mean_reward() -> None:
    failed = rollouts_of([[(1.0, "timeout"), (1.0, "error")]])
    found = rollout_metrics(failed, np.zeros(2))
    assert "reward/mean" not in found and "reward/std" not in found
    assert found["reward/zero_advantage_fraction"] == 1.0


def test_a_log_prob_that_is_not_a_number_stays_out_of_the_gap_between_engine_and_actor() -> None:
    batch, _ = batch_of(rollouts_of(GROUPS))
    sequences = batch.sequences
    scores = {name: np.zeros(sequences.num_sampled_tokens) for name in ("entropy", "log_z", "in_filter", "log_probs")}
    found = policy_metrics(sequences, scores, batch.fresh)
    assert np.isfinite(list(found.values())).all() and found["logprob/rollout_actor_abs_diff"] > 0
    nothing = sequences.with_values(rollout_log_probs=np.full(sequences.num_sampled_tokens, NAN))
    assert not [name for name in policy_metrics(nothing, scores, batch.fresh) if name.startswith("logprob/")]


def test_a_group_has_signal_only_if_its_rewards_differ() -> None:
    def signal(*sampled: Sampled) -> bool:
        (group,) = rollouts_of([list(sampled)]).sampled
        return group.has_signal

    assert not signal((1.0, "score"), (0.0, "timeout"))
    assert not signal((1.0, "score"), (0.0, "error"), (1.0, "score"))
    assert not signal((0.0, "error"), (1.0, "timeout"))
    assert signal((1.0, "score"), (0.0, "score"), (1.0, "timeout"))


def test_a_failure_says_nothing_by_its_score() -> None:
    """A verifier may return any score beside a failure."""
    (group,) = rollouts_of([[(1.0, "score"), (0.5, "error")]]).sampled
    assert group.scores == [1.0]
    assert replace(group, rewards=()).scores == []
