"""The mini-batches of a step, what their losses are means over, and the metrics of the updates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpreg import make_loss
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.mini_batches import mini_batches
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.cluster.actors import StepResult
from megatron_rl.errors import UserError
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.update import denominator, old_policy_kl, update


@given(
    groups=st.integers(1, 6).flatmap(lambda n: st.permutations(list(range(n)) * 3)),
    per_pass=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_an_epoch_holds_every_sequence_once_in_complete_groups(
    groups: list[int], per_pass: int, epochs: int, seed: int
) -> None:
    of_row = np.array(groups)
    batches = mini_batches(of_row, updates=per_pass * epochs, epochs=epochs, seed=seed)
    assert len(batches) == per_pass * epochs
    for start in range(0, len(batches), per_pass):
        one_pass = batches[start : start + per_pass]
        assert sorted(np.concatenate(one_pass)) == list(range(len(groups)))
        for rows in one_pass:
            assert (np.diff(rows) > 0).all()
            assert not set(of_row[rows]) & set(np.delete(of_row, rows))
    again = mini_batches(of_row, updates=per_pass * epochs, epochs=epochs, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_the_first_epoch_keeps_the_order_of_the_draw_and_the_next_has_another() -> None:
    groups = np.repeat(np.arange(40), 2)
    first, second = (mini_batches(groups, updates=80, epochs=2, seed=5)[at : at + 40] for at in (0, 40))
    assert [int(groups[rows[0]]) for rows in first] == list(range(40))
    assert [int(groups[rows[0]]) for rows in second] != list(range(40))


LENGTHS = [2, 3, 1, 4]
GROUPS, ADVANTAGES = np.array([0, 0, 1, 1]), np.array([1.0, -1.0, 0.0, 0.0])
TOKENS = sum(LENGTHS)


def batch() -> SequenceBatch:
    sequences = SequenceBatch.of([np.full(1 + n, row) for row, n in enumerate(LENGTHS)], np.ones(4, dtype=np.int64))
    old = np.arange(TOKENS, dtype=np.float32)
    selected = np.arange(TOKENS) < 4
    per_token = sequences.per_token(ADVANTAGES)
    return sequences.with_values(
        advantages=per_token, old_log_probs=old, selected=selected, not_for_the_loss=np.zeros(TOKENS)
    )


class Actors:
    """Answers that the log-probs have grown by 0.5 since the old policy."""

    def __init__(self, loss: float = 2.0) -> None:
        self.calls: list[tuple[list[int], float]] = []
        self.coefficients: list[list[float]] = []
        self.loss = loss

    def train(self, rows: SequenceBatch, *, lr: float, denominator: float, temperature: float) -> StepResult:
        values = set(rows.values) - {"entropy_coefficient"}
        assert values == {"advantages", "old_log_probs", "selected"}, "other values need not travel"
        self.coefficients.append(rows.values.get("entropy_coefficient", np.zeros(0)).tolist())
        self.calls.append(([int(ids[0]) for ids in rows.sequences], denominator))
        n = len(self.calls)
        log_probs = rows.values["old_log_probs"] + np.float32(0.5)
        found = {"log_probs": log_probs, "entropy": np.full_like(log_probs, 0.25 * n)}
        return StepResult(found, self.loss * n, {"ratio": (3.0 * n, 2.0 * n), "selected_fraction": (1.0, 5.0)}, 4.0 * n)


def stepped(
    actors: Actors, name: str = "grpo", updates: int = 1, epochs: int = 1, **settings: Any
) -> tuple[dict[str, float], TrainingBatch, Learner]:
    """The updates of a step: metrics, the batch after them, the learner."""
    train = SimpleNamespace(updates_per_rollout=updates, epochs_per_rollout=epochs, drop_zero_advantage=True)
    config: Any = SimpleNamespace(train=train, rollout=SimpleNamespace(temperature=1.0))
    passes: Any = SimpleNamespace(off_policy=updates > 1)
    learner = Learner(config, actors, make_loss(name, **settings), passes, weight_version=7)  # type: ignore[arg-type]
    sequences = batch()
    scores: dict[str, Array] = {"log_probs": sequences.values["old_log_probs"]} if updates > 1 else {}
    before = TrainingBatch(sequences, GROUPS, ADVANTAGES, np.ones(TOKENS, dtype=bool), scores)
    after, metrics = update(learner, 3, before, lr=0.1, seed=3)
    return metrics, after, learner


def test_one_update_trains_the_sequences_with_an_advantage_and_averages_over_all() -> None:
    actors = Actors()
    metrics, after, learner = stepped(actors)
    assert actors.calls == [([0, 1], TOKENS)]
    assert learner.weight_version == 8
    assert metrics["train/row_fraction"] == 0.5 and metrics["train/updates"] == 1 and metrics["train/lr"] == 0.1
    assert metrics["lpreg/selected_fraction"] == 1 / TOKENS
    assert "train/kl_old_policy" not in metrics
    assert np.isnan(after.scores["log_probs"]).tolist() == [False] * 5 + [True] * 5


def test_a_mini_batch_averages_over_itself_and_needs_a_sequence_to_train() -> None:
    actors = Actors()
    metrics, _, learner = stepped(actors, updates=2)
    assert actors.calls == [([0, 1], 5)]
    assert learner.weight_version == 8
    assert metrics["train/updates"] == 1
    # An entropy bonus trains every sequence.
    actors = Actors()
    stepped(actors, "entropy_bonus", updates=2)
    assert actors.calls == [([0, 1], 5), ([2, 3], 5)]


def test_the_entropy_coefficient_of_an_update_follows_from_the_entropy_of_the_one_before() -> None:
    """The entropies of the four updates are .25, .5, .75 and 1, and the target is .6."""
    actors = Actors()
    _, _, learner = stepped(actors, "entropy_bonus", updates=4, epochs=2, coefficient=0.5, target=0.6, step=0.25)
    assert actors.coefficients == [[], [0.75] * 5, [1.0] * 5, [0.75] * 5]
    assert learner.entropy_coefficient == 0.5


def test_metrics_cover_all_updates() -> None:
    metrics, _, learner = stepped(Actors(), "entropy_bonus", updates=4, epochs=2)
    assert learner.weight_version == 7 + 4
    assert metrics["train/loss"] == 5.0 and metrics["train/grad_norm"] == 10.0 and metrics["train/grad_norm_max"] == 16
    assert metrics["train/ratio"] == 1.5
    assert metrics["lpreg/selected_fraction"] == 4 / (2 * TOKENS)
    assert metrics["train/kl_old_policy"] == pytest.approx(np.expm1(0.5) - 0.5)


@pytest.mark.parametrize(
    ("name", "settings", "counts"),
    [
        ("grpo", {}, [5, 5]),
        ("grpo", {"aggregation": "sequence_mean_token_mean"}, [2, 2]),
        ("gspo", {}, [2, 2]),
        ("high_entropy", {"share": 0.3}, [4, 1]),  # one where none is selected: nothing is divided by 0
        ("clip_cov", {}, [5, 5]),
    ],
)
def test_denominators(name: str, settings: dict[str, Any], counts: list[int]) -> None:
    loss = make_loss(name, **settings)
    assert [denominator(loss, batch(), np.array(rows)) for rows in ([0, 1], [2, 3])] == counts


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"step 3: loss nan.*resume=auto"):
        stepped(Actors(loss=np.nan), updates=2)


def test_the_old_policys_divergence_is_never_negative() -> None:
    assert old_policy_kl(np.array([-1.0, 0.0, 1.0])) > 0 == old_policy_kl(np.zeros(3))


@pytest.mark.filterwarnings("error")
def test_the_old_policys_divergence_over_no_tokens_is_0() -> None:
    assert old_policy_kl(np.zeros(0, dtype=np.float32)) == 0


@pytest.mark.parametrize("name", ["grpo", "gspo", "high_entropy"])
def test_a_mini_batch_without_sampled_tokens_has_a_denominator(name: str) -> None:
    nothing = SequenceBatch.of([[1], [2]], [1, 1]).with_values(selected=np.zeros(0, dtype=bool))
    assert denominator(make_loss(name), nothing, np.array([0])) == 1
