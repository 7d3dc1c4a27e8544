"""What the driver marks before a step, and what it lets the loss be a mean over, for each kind of rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpreg import make_loss
from megatron_rl.batching.rows import Rows
from megatron_rl.loop import denominator, select

LENGTHS = [3, 5, 2]
TOKENS = sum(LENGTHS)
LOG_PROBS = -np.arange(TOKENS, dtype=np.float32)
ENTROPY = np.array([4, 1, 9, 2, 8, 3, 0, 7, 5, 6], dtype=np.float32)
ADVANTAGES = np.repeat([1.0, -1.0, 0.5], LENGTHS).astype(np.float32)


def batch() -> Rows:
    return Rows(
        tokens=[np.ones(1 + length, dtype=np.int64) for length in LENGTHS],
        prompt_lengths=np.ones(len(LENGTHS), dtype=np.int64),
        values={"rollout_log_probs": LOG_PROBS, "advantages": ADVANTAGES},
    )


def marked(name: str, step: int = 1, log_probs_of: str = "rollout", **settings: Any) -> tuple[Rows, dict, list[str]]:
    """The batch after `select`, its metrics, and what was asked of the actor."""
    asked: list[str] = []

    def score(batch: Rows, temperature: float, weights: str = "current") -> dict[str, np.ndarray]:
        asked.append(f"score {len(batch)} rows, {weights}")
        tokens = batch.num_response_tokens
        entropy = ENTROPY if tokens == TOKENS else np.zeros(tokens)
        return {"log_probs": -LOG_PROBS[:tokens], "entropy": entropy, "kept": np.ones(tokens, dtype=bool)} | {
            "log_z": np.zeros(tokens)
        }

    run: Any = SimpleNamespace(
        config=SimpleNamespace(algorithm=SimpleNamespace(selection_log_probs=log_probs_of)),
        loss=make_loss(name, **settings),
        actors=SimpleNamespace(score=score, snapshot=lambda: asked.append("snapshot")),
        temperature=1.0,
        sampling=lambda step: SimpleNamespace(seed=step),
        snapshot_due=lambda step: True,
    )
    rows, metrics = select(run, step, batch())
    return rows, metrics, asked


def test_a_method_without_a_rule_marks_nothing() -> None:
    rows, metrics, asked = marked("grpo")
    assert "selected" not in rows.values and metrics == {} and asked == []


@pytest.mark.parametrize(("source", "lowest"), [("rollout", [8, 9]), ("actor", [0, 1])])
def test_lowest_log_probs_of_the_engine_or_the_actor(source: str, lowest: list[int]) -> None:
    rows, metrics, asked = marked("lp_reg", log_probs_of=source, rho=0.2)
    assert np.flatnonzero(rows.values["selected"]).tolist() == lowest
    assert metrics["lpreg/below_delta_fraction"] == 0.2
    assert asked == (["score 3 rows, current"] if source == "actor" else [])


def test_entropies_come_from_the_actor() -> None:
    rows, metrics, asked = marked("high_entropy", share=0.3)
    assert np.flatnonzero(rows.values["selected"]).tolist() == [2, 4, 7]
    assert metrics == {"lpreg/entropy_threshold": 7.0} and asked == ["score 3 rows, current"]


def test_covariance_is_of_the_whole_step() -> None:
    rows, _, asked = marked("kl_cov", share=0.1)
    covariance = (ADVANTAGES - ADVANTAGES.mean()) * (LOG_PROBS - LOG_PROBS.mean())
    assert np.flatnonzero(rows.values["selected"]).tolist() == [covariance.argmax()] and asked == []


def test_random_draws_differ_from_step_to_step_and_not_from_run_to_run() -> None:
    draws = [marked("lp_reg", step=step, select_by="random", rho=0.3)[0].values["selected"] for step in (1, 1, 2)]
    assert [int(draw.sum()) for draw in draws] == [3, 3, 3]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        ({"rho": 0.1}, 0),
        ({"rho": 0.5}, 1),
        ({"select_by": "all"}, 1),
        ({"select_by": "all", "advantage_sign": "both"}, 3),
    ],
)
def test_the_lagged_proxy_is_scored_only_where_it_matters(settings: dict, scored: int) -> None:
    rows, _, asked = marked("lp_reg", proxy_source="lagged", **settings)
    assert rows.values["proxy_log_probs"].shape == (TOKENS,)
    assert asked == ["snapshot", *([f"score {scored} rows, lagged"] if scored else [])]


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("grpo", {}, TOKENS),
        ("grpo", {"aggregation": "sequence_mean_token_mean"}, 3),
        ("gspo", {}, 3),
        ("high_entropy", {"share": 0.3}, 3),
        ("clip_cov", {}, TOKENS),
    ],
)
def test_denominators(name: str, settings: dict, count: int) -> None:
    assert denominator(make_loss(name, **settings), marked(name, **settings)[0]) == count
