"""The passes that a configuration states are the forwards that a step really runs, sequence by sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.actor.passes.policy_loss import LossChoice
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.cluster.actors import StepResult
from megatron_rl.config import Config, load_config
from megatron_rl.config.passes import passes_of
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select
from megatron_rl.training.update import update

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/countdown.yaml"
ADVANTAGES = np.array([1.0, -1.0, 0.0, 0.0])
TRAINED, DROPPED = [0, 1], [2, 3]


class CountingActors:
    """Notes which sequences each forward without gradients runs, by the weights that run it."""

    def __init__(self) -> None:
        self.scored: dict[str, list[int]] = {}

    def snapshot(self, name: str) -> None: ...

    def score_and_store(
        self, batch: SequenceBatch, temperature: float, weights: str = "current"
    ) -> tuple[dict[str, np.ndarray], StoredProxy]:
        rows = [int(sequence[0]) for sequence in batch.sequences]
        self.scored.setdefault(weights, []).extend(rows)
        count = batch.num_sampled_tokens
        nothing = StoredProxy(np.zeros(count, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return self._values(count), nothing

    def score(self, batch: SequenceBatch, temperature: float, weights: str = "current") -> dict[str, np.ndarray]:
        return self.score_and_store(batch, temperature, weights)[0]

    def train(self, batch: SequenceBatch, *, lr: float, denominator: float, temperature: float) -> StepResult:
        return StepResult(self._values(batch.num_sampled_tokens), 0.0, {}, 1.0)

    def _values(self, count: int) -> dict[str, np.ndarray]:
        names = ("log_probs", "entropy", "log_z", "in_filter")
        return {name: np.linspace(-2, -1, count, dtype=np.float32) for name in names}


def configured(*overrides: str) -> Config:
    return load_config(QUICKSTART, ["algorithm.proxy_source=old", *overrides])


def scored(config: Config) -> dict[str, list[int]]:
    """Weights -> the sequences that they score in one step, of which two have an advantage."""
    actors = CountingActors()
    sequences = SequenceBatch.of([[row, 5, 6, 7] for row in range(4)], [1] * 4)
    values: dict[str, Any] = {
        "advantages": sequences.per_token(ADVANTAGES).astype(np.float32),
        "rollout_log_probs": np.linspace(-3, -1, sequences.num_sampled_tokens, dtype=np.float32),
    }
    batch = TrainingBatch(
        sequences.with_values(**values), np.arange(4), ADVANTAGES, np.ones(sequences.num_sampled_tokens, dtype=bool)
    )
    learner = Learner(config, actors, LossChoice.of(config.algorithm).make(), passes_of(config))  # type: ignore[arg-type]
    batch = score_old_policy(learner, batch)
    batch, _ = select(learner, batch, seed=0)
    batch = score_lagged_policy(learner, 1, batch)
    batch = score_reference(learner, batch)
    update(learner, 1, batch, lr=0.1, seed=0)
    return {weights: sorted(rows) for weights, rows in actors.scored.items() if rows}


@pytest.mark.parametrize(
    ("overrides", "forwards", "current"),
    [
        (["algorithm.name=grpo"], 0, DROPPED),
        (["algorithm.name=grpo", "train.score_dropped=false"], 0, []),
        (["algorithm.name=grpo", "algorithm.correction.weights=truncated"], 0, DROPPED),
        (["algorithm.name=grpo", "algorithm.correction.reject_sequences=true"], 0, DROPPED),
        (["algorithm.name=grpo", "algorithm.selection_log_probs=actor"], 0, DROPPED),
        (["algorithm.name=lp_reg"], 0, DROPPED),
        (["algorithm.name=lp_reg", "algorithm.selection_log_probs=actor"], 1, TRAINED + DROPPED),
        (["algorithm.name=lp_reg", "algorithm.correction.weights=truncated"], 0, DROPPED),
        (["algorithm.name=high_entropy"], 1, TRAINED + DROPPED),
        (["algorithm.name=grpo", "train.updates_per_rollout=4"], 1, TRAINED + DROPPED),
        (["algorithm.name=grpo", "train.updates_per_rollout=4", "train.score_dropped=false"], 1, TRAINED),
        (
            ["train.updates_per_rollout=4", "train.score_dropped=false", "algorithm.selection_log_probs=rollout"],
            1,
            TRAINED,
        ),
        (["train.updates_per_rollout=4", "train.score_dropped=false"], 1, TRAINED + DROPPED),
    ],
)
def test_a_step_scores_what_the_passes_state(overrides: list[str], forwards: int, current: list[int]) -> None:
    config = configured(*overrides)
    found = scored(config)
    assert found.get("current", []) == current
    assert passes_of(config).forwards == forwards
    assert (set(TRAINED) <= set(current)) == passes_of(config).old_policy


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.name=grpo", "train.score_dropped=false"], "none"),
        (["algorithm.name=grpo"], "current weights (dropped sequences, for metrics)"),
        (["algorithm.name=entropy_bonus"], "none"),  # every sequence is trained
        (["algorithm.name=high_entropy"], "current weights (all sequences)"),
        (["train.updates_per_rollout=4", "algorithm.name=grpo"], "current weights (all sequences)"),
        (
            ["train.updates_per_rollout=4", "algorithm.name=grpo", "train.score_dropped=false"],
            "current weights (trained sequences)",
        ),
        (
            ["algorithm.proxy_source=lagged", "algorithm.reference_kl.coefficient=0.1"],
            "lagged snapshot (sequences with a token that its proxy can affect), reference model (trained sequences)",
        ),
    ],
)
def test_the_forwards_of_a_configuration_in_one_line(overrides: list[str], words: str) -> None:
    assert str(passes_of(configured(*overrides))) == f"forwards without gradient: {words}"


def test_lagged_and_reference_policies_score_only_what_the_loss_reads() -> None:
    config = configured("algorithm.proxy_source=lagged", "algorithm.reference_kl.coefficient=0.1")
    passes, found = passes_of(config), scored(config)
    assert passes.lagged_proxy and passes.reference and passes.forwards == 2
    assert found["reference"] == TRAINED + DROPPED, "a reference KL has a gradient on every token"
    assert set(found.get("lagged", [])) <= {1}, "the lagged proxy matters for negative advantages only"
