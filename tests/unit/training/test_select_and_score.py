"""What a step asks of the actor before its first update, and which tokens it marks, for each kind of rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpreg import make_loss
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.run.run import Run
from megatron_rl.training.policies import score_lagged_policy, score_old_policy
from megatron_rl.training.selection import select, selection_overlap

LENGTHS = [3, 5, 2]
TOKENS = sum(LENGTHS)
LOG_PROBS = -np.arange(TOKENS, dtype=np.float32)
ENTROPY = np.array([4, 1, 9, 2, 8, 3, 0, 7, 5, 6], dtype=np.float32)
ADVANTAGES = np.array([1.0, -1.0, 0.0])


@dataclass
class Step:
    """A step of three responses up to its first update, and what was asked of the actor. Its log-probs are those of the
    engine upside down."""

    name: str = "lp_reg"
    number: int = 1
    selection_log_probs: str = "auto"
    updates: int = 1
    score_dropped: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked: list[str] = []
        train = SimpleNamespace(
            drop_zero_advantage=True, score_dropped=self.score_dropped, updates_per_rollout=self.updates
        )
        algorithm = SimpleNamespace(selection_log_probs=self.selection_log_probs)
        loss = make_loss(self.name, **self.settings)
        run: Any = SimpleNamespace(
            config=SimpleNamespace(algorithm=algorithm, train=train, keeps_rollouts=False),
            loss=loss,
            actors=SimpleNamespace(score_and_store=self.score, snapshot=lambda name: self.asked.append(f"keep {name}")),
            temperature=1.0,
            sampling=lambda step: SimpleNamespace(seed=step),
            snapshot_due=lambda step: True,
        )
        for name in ("off_policy", "ranks_by_actor"):
            setattr(run, name, getattr(Run, name).fget(run))
        rows = SequenceBatch(
            tokens=[np.full(1 + length, row, dtype=np.int64) for row, length in enumerate(LENGTHS)],
            prompt_lengths=np.ones(len(LENGTHS), dtype=np.int64),
        )
        advantages = rows.per_token(ADVANTAGES).astype(np.float32)
        rows = rows.with_values(rollout_log_probs=LOG_PROBS, advantages=advantages, place=np.arange(TOKENS))
        rows, self.seen = score_old_policy(run, rows, ADVANTAGES)
        rows, self.metrics = select(run, self.number, rows, self.seen)
        self.rows = score_lagged_policy(run, self.number, rows)
        self.overlap = selection_overlap(run, self.rows, self.seen)

    def score(
        self, batch: SequenceBatch, temperature: float, weights: str = "current"
    ) -> tuple[dict[str, Array], StoredProxy]:
        """Where the proxy is wanted, an entry whose id is the token's place."""
        place = batch.values["place"]
        wanted = batch.values.get("proxy_wanted", np.zeros(len(place), dtype=bool))
        ids = place[wanted]
        proxy = StoredProxy(wanted.astype(np.int64), ids.astype(np.int32), ids.astype(np.float32))
        if not len(batch):
            return {}, proxy
        self.asked.append(f"{weights} {[int(row[0]) for row in batch.tokens]}")
        values = {"log_probs": LOG_PROBS[::-1][place], "entropy": ENTROPY[place]}
        return values | {"log_z": np.full(len(place), -0.5), "kept": place % 2 == 0}, proxy

    @property
    def selected(self) -> list[int]:
        return np.flatnonzero(self.rows.values["selected"]).tolist()


def test_on_policy_only_the_dropped_rows_are_scored() -> None:
    step = Step("grpo")
    assert step.asked == ["current [2]"] and step.metrics == {} and step.overlap == {}
    assert np.isnan(step.seen["entropy"]).tolist() == [True] * 8 + [False] * 2
    assert set(step.rows.values) == {"rollout_log_probs", "advantages", "place"}
    assert Step("grpo", score_dropped=False).asked == []
    assert Step("kl_cov", settings={"share": 0.1}).asked == []  # acts without an advantage: nothing is dropped


@pytest.mark.parametrize(("score_dropped", "rows"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_off_policy_one_forward_fixes_the_old_policy(score_dropped: bool, rows: list[int]) -> None:
    step = Step("grpo", updates=2, score_dropped=score_dropped)
    assert step.asked == [f"current {rows}"]
    known = rows_tokens(rows)
    assert step.rows.values["old_log_probs"][known].tolist() == LOG_PROBS[::-1][known].tolist()
    assert step.rows.values["old_log_z"][known].tolist() == [-0.5] * len(known)
    assert step.rows.values["old_kept"].dtype == bool
    assert step.rows.values["old_kept"][known].tolist() == [place % 2 == 0 for place in known]


def rows_tokens(rows: list[int]) -> list[int]:
    ends = np.cumsum(LENGTHS)
    return [place for row in rows for place in range(ends[row] - LENGTHS[row], ends[row])]


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
def test_lowest_log_probs_of_the_engine_or_the_actor(source: str, updates: int, lowest: list[int]) -> None:
    step = Step(selection_log_probs=source, updates=updates, score_dropped=False, settings={"rho": 0.2})
    assert step.selected == lowest
    assert step.metrics["lpreg/below_delta_fraction"] == 0.2
    if lowest == [0, 1]:
        assert step.asked == ["current [0, 1, 2]"], "a ranking is of all rows"
        assert step.overlap == {"lpreg/selection_overlap": 0.0}
    else:
        assert step.overlap == {}, "the actor has not seen every token"


def test_entropies_come_from_the_actor() -> None:
    step = Step("high_entropy", settings={"share": 0.3})
    assert step.selected == [2, 4, 7]
    assert step.metrics == {"lpreg/entropy_threshold": 7.0} and step.asked == ["current [0, 1, 2]"]


def test_covariance_is_of_the_whole_step() -> None:
    step = Step("kl_cov", settings={"share": 0.1})
    advantages = np.repeat(ADVANTAGES, LENGTHS)
    covariance = (advantages - advantages.mean()) * (LOG_PROBS - LOG_PROBS.mean())
    assert step.selected == [covariance.argmax()]


def test_random_draws_differ_from_step_to_step_and_not_from_run_to_run() -> None:
    settings = {"select_by": "random", "rho": 0.3}
    draws = [Step(number=number, settings=settings).selected for number in (1, 1, 2)]
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
    log_q = step.rows.values["proxy_log_probs"]
    want = np.full(TOKENS, -np.inf)
    for place in rows_tokens(scored):
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
        assert step.rows.proxy is None
        return
    assert step.rows.proxy is not None
    assert step.rows.proxy.counts.nonzero()[0].tolist() == stored
    assert step.rows.proxy.ids.tolist() == stored


def test_without_a_rule_all_that_may_matter_is_stored() -> None:
    settings = {"kl_estimator": "full", "proxy_source": "old", "select_by": "all"}
    proxy = Step(updates=2, settings=settings).rows.proxy
    assert proxy is not None and proxy.ids.tolist() == [3, 4, 5, 6, 7]
