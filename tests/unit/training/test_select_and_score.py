"""The forwards that a step runs before its first update, and the tokens that it selects, for each kind of rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpreg import PolicyLoss, make_loss
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.config.passes import Passes
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select, selection_overlap

LENGTHS = [3, 5, 2]
TOKENS = sum(LENGTHS)
LOG_PROBS = -np.arange(TOKENS, dtype=np.float32)
ENTROPY = np.array([4, 1, 9, 2, 8, 3, 0, 7, 5, 6], dtype=np.float32)
ADVANTAGES = np.array([1.0, -1.0, 0.0])


def passes(loss: PolicyLoss, *, updates: int, source: str, score_dropped: bool, reference: bool = False) -> Passes:
    """The passes that `passes_of` finds for such a configuration, stated once more."""
    off_policy, rule = updates > 1, loss.selection
    by_actor = source == "actor" or (source == "auto" and off_policy) or (rule is not None and rule.needs_entropy)
    return Passes(
        off_policy=off_policy,
        ranked_by=None if rule is None else "actor" if by_actor else "rollout",
        scores_dropped=score_dropped,
        stores_old_proxy=off_policy and loss.proxy_source == "old" and loss.needs_proxy_kl,
        lagged_proxy=loss.proxy_source == "lagged",
        stores_lagged_proxy=loss.proxy_source == "lagged" and loss.needs_proxy_kl,
        reference=reference,
    )


@dataclass
class Step:
    """A step of three responses up to its first update, and what was asked of the actor. The log-probs of the actor are
    those of the engine in reverse order."""

    name: str = "lp_reg"
    seed: int = 1
    selection_log_probs: str = "auto"
    updates: int = 1
    score_dropped: bool = True
    reference: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked: list[str] = []
        loss = make_loss(self.name, **self.settings)
        config: Any = SimpleNamespace(
            algorithm=SimpleNamespace(proxy_refresh_steps=1),
            train=SimpleNamespace(drop_zero_advantage=True),
            rollout=SimpleNamespace(temperature=1.0),
        )
        actors: Any = SimpleNamespace(
            score_and_store=self.score,
            score=lambda batch, **more: self.score(batch, **more)[0],
            snapshot=lambda name: self.asked.append(f"keep {name}"),
        )
        needed = passes(
            loss,
            updates=self.updates,
            source=self.selection_log_probs,
            score_dropped=self.score_dropped,
            reference=self.reference,
        )
        learner = Learner(config, actors, loss, needed)
        sequences = SequenceBatch.of(
            [np.full(1 + length, row) for row, length in enumerate(LENGTHS)], np.ones(len(LENGTHS), dtype=np.int64)
        )
        sequences = sequences.with_values(
            rollout_log_probs=LOG_PROBS, advantages=sequences.per_token(ADVANTAGES).astype(np.float32)
        )
        batch = TrainingBatch(sequences, np.arange(len(LENGTHS)), ADVANTAGES, np.ones(TOKENS, dtype=bool))
        batch = score_old_policy(learner, batch)
        batch, self.metrics = select(learner, batch, self.seed)
        batch = score_lagged_policy(learner, 1, batch)
        self.batch = score_reference(learner, batch)
        self.overlap = selection_overlap(learner, self.batch)

    def score(
        self, batch: SequenceBatch, temperature: float, weights: str = "current"
    ) -> tuple[dict[str, Array], StoredProxy]:
        """Stores one proxy entry per token that needs one; its id is the index of the token in the step."""
        rows = [int(ids[0]) for ids in batch.sequences]
        place = np.array(tokens_of(rows), dtype=np.int64)
        wanted = batch.values.get("proxy_wanted", np.zeros(len(place), dtype=bool))
        assert set(batch.values) <= {"proxy_wanted"}, "other values need not travel"
        ids = place[wanted]
        proxy = StoredProxy(wanted.astype(np.int64), ids.astype(np.int32), ids.astype(np.float32))
        if not len(batch):
            return {}, proxy
        self.asked.append(f"{weights} {rows}")
        values = {"log_probs": LOG_PROBS[::-1][place], "entropy": ENTROPY[place]}
        return values | {"log_z": np.full(len(place), -0.5), "in_filter": place % 2 == 0}, proxy

    @property
    def values(self) -> dict[str, Array]:
        return self.batch.sequences.values

    @property
    def selected(self) -> list[int]:
        return np.flatnonzero(self.values["selected"]).tolist()


def tokens_of(rows: list[int]) -> list[int]:
    """Indices of the sampled tokens of these sequences."""
    ends = np.cumsum(LENGTHS)
    return [place for row in rows for place in range(ends[row] - LENGTHS[row], ends[row])]


def test_on_policy_only_the_dropped_sequences_are_scored() -> None:
    step = Step("grpo")
    assert step.asked == ["current [2]"] and step.metrics == {} and step.overlap == {}
    assert np.isnan(step.batch.scores["entropy"]).tolist() == [True] * 8 + [False] * 2
    assert set(step.values) == {"rollout_log_probs", "advantages"}
    assert Step("grpo", score_dropped=False).asked == []
    assert Step("kl_cov", settings={"share": 0.1}).asked == []  # a gradient without advantage: none is dropped


@pytest.mark.parametrize(("score_dropped", "rows"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_off_policy_one_forward_fixes_the_old_policy(score_dropped: bool, rows: list[int]) -> None:
    step = Step("grpo", updates=2, score_dropped=score_dropped)
    assert step.asked == [f"current {rows}"]
    known = tokens_of(rows)
    assert step.values["old_log_probs"][known].tolist() == LOG_PROBS[::-1][known].tolist()
    assert step.values["old_log_z"][known].tolist() == [-0.5] * len(known)
    assert step.values["old_in_filter"].dtype == bool
    assert step.values["old_in_filter"][known].tolist() == [place % 2 == 0 for place in known]


@pytest.mark.parametrize(
    ("source", "updates", "lowest"),
    [
        ("auto", 1, [8, 9]),
        ("rollout", 1, [8, 9]),
        ("actor", 1, [0, 1]),
        ("auto", 2, [0, 1]),
        ("rollout", 2, [8, 9]),
        ("actor", 2, [0, 1]),
    ],
)
def test_the_lowest_log_probs_are_those_of_the_engine_or_of_the_actor(
    source: str, updates: int, lowest: list[int]
) -> None:
    step = Step(selection_log_probs=source, updates=updates, score_dropped=False, settings={"rho": 0.2})
    assert step.selected == lowest
    assert step.metrics["lpreg/below_delta_fraction"] == 0.2
    if lowest == [0, 1]:
        assert step.asked == ["current [0, 1, 2]"], "a ranking covers all sequences"
        assert step.overlap == {"lpreg/selection_overlap": 0.0}
    else:
        assert step.overlap == {}, "the actor has not seen every token"


def test_entropies_come_from_the_actor() -> None:
    step = Step("high_entropy", settings={"share": 0.3})
    assert step.selected == [2, 4, 7]
    assert step.metrics == {"lpreg/entropy_threshold": 7.0} and step.asked == ["current [0, 1, 2]"]


def test_the_covariance_is_taken_over_the_whole_step() -> None:
    step = Step("kl_cov", settings={"share": 0.1})
    advantages = np.repeat(ADVANTAGES, LENGTHS)
    covariance = (advantages - advantages.mean()) * (LOG_PROBS - LOG_PROBS.mean())
    assert step.selected == [covariance.argmax()]


def test_random_draws_differ_between_steps_and_not_between_runs() -> None:
    settings = {"select_by": "random", "rho": 0.3}
    draws = [Step(seed=seed, settings=settings).selected for seed in (1, 1, 2)]
    assert [len(draw) for draw in draws] == [3, 3, 3]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({"rho": 0.1}, []),
        ({"rho": 0.5}, [1]),
        ({"select_by": "all"}, [1]),
        ({"select_by": "all", "advantage_sign": "both"}, [0, 1]),
    ],
)
def test_the_lagged_proxy_is_scored_only_where_it_matters(settings: dict[str, Any], scored: list[int]) -> None:
    step = Step(score_dropped=False, settings={"proxy_source": "lagged", **settings})
    assert step.asked == ["keep lagged", *([f"lagged {scored}"] if scored else [])]
    log_q = step.values["proxy_log_probs"]
    want = np.full(TOKENS, -np.inf)
    for place in tokens_of(scored):
        if place % 2 == 0:
            want[place] = LOG_PROBS[::-1][place] + 0.5
    assert log_q.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("source", "updates", "stored"),
    [
        ("current", 2, None),
        ("old", 1, None),  # the policy in training is the one that sampled
        ("old", 2, [3, 4]),  # selected, and of negative advantage
        ("lagged", 1, [3, 4]),
        ("lagged", 2, [3, 4]),
    ],
)
def test_the_full_kl_stores_the_proxy_of_the_selected_tokens(
    source: str, updates: int, stored: list[int] | None
) -> None:
    settings = {"kl_estimator": "full", "proxy_source": source, "rho": 0.5}
    step = Step(updates=updates, selection_log_probs="actor", settings=settings)
    assert step.selected == [0, 1, 2, 3, 4]
    if stored is None:
        assert step.batch.sequences.proxy is None
        return
    assert step.batch.sequences.proxy is not None
    assert step.batch.sequences.proxy.counts.nonzero()[0].tolist() == stored
    assert step.batch.sequences.proxy.ids.tolist() == stored


def test_without_a_rule_the_proxy_of_every_token_that_may_matter_is_stored() -> None:
    settings = {"kl_estimator": "full", "proxy_source": "old", "select_by": "all"}
    proxy = Step(updates=2, settings=settings).batch.sequences.proxy
    assert proxy is not None and proxy.ids.tolist() == [3, 4, 5, 6, 7]


def test_the_reference_scores_the_trained_sequences() -> None:
    step = Step("grpo", score_dropped=False, reference=True)
    assert step.asked == ["reference [0, 1]"]
    values, known = step.values["reference_log_probs"], tokens_of([0, 1])
    assert values[known].tolist() == LOG_PROBS[::-1][known].tolist() and np.isnan(values[tokens_of([2])]).all()
    assert "reference_log_probs" not in Step("grpo").values


@pytest.mark.filterwarnings("error")
def test_rankings_of_no_tokens_overlap_in_nothing() -> None:
    loss, nothing = make_loss("lp_reg"), np.zeros(0, dtype=np.float32)
    sequences = SequenceBatch.of([[1]], [1]).with_values(rollout_log_probs=nothing, selected=nothing.astype(bool))
    batch = TrainingBatch(sequences, np.zeros(1, np.int64), np.ones(1), np.zeros(0, bool), {"log_probs": nothing})
    config: Any = SimpleNamespace()
    learner = Learner(config, config, loss, passes(loss, updates=1, source="auto", score_dropped=True))
    assert selection_overlap(learner, batch) == {"lpreg/selection_overlap": 0.0}
