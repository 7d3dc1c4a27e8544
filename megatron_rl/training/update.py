"""The optimizer updates of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import lpreg
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.mini_batches import mini_batches
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.errors import UserError
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.metrics import update_metrics

if TYPE_CHECKING:
    from megatron_rl.cluster.actors import StepResult

LOSS_VALUES = (
    "advantages",
    "old_log_probs",
    "old_log_z",
    "old_in_filter",
    "selected",
    "proxy_log_probs",
    "reference_log_probs",
    "rollout_log_probs",
    "entropy_coefficient",
)
"""The values per token that a loss can read."""


def update(
    learner: Learner, step: int, batch: TrainingBatch, *, lr: float, seed: int
) -> tuple[TrainingBatch, dict[str, float]]:
    """Runs all updates of a step, one per mini-batch. Returns the batch, on-policy with the scores that the updates'
    own forwards found, and metrics.

    The loss of a mini-batch is a mean over all of its counted tokens (or responses), those of dropped sequences
    included. A mini-batch without any trained sequence is no update. `seed`: for the order of the groups in later
    epochs.
    """
    settings, trained = learner.config.train, learner.trained(batch)
    sequences = batch.sequences.only(LOSS_VALUES)
    results: list[StepResult] = []
    tokens = 0
    moved: list[Array] = []
    for rows in mini_batches(
        batch.groups, updates=settings.updates_per_rollout, epochs=settings.epochs_per_rollout, seed=seed
    ):
        rows = rows[batch.counted[rows]]
        tokens += int(sequences.sampled_lengths[rows].sum())
        chosen = rows[trained[rows]]
        if not len(chosen):
            continue
        result = learner.actors.train(
            _with_coefficient(sequences.take(chosen), learner.entropy_coefficient),
            lr=lr,
            denominator=denominator(learner.loss, sequences, rows),
            temperature=learner.temperature,
        )
        _check_finite(step, result)
        learner.weight_version += 1
        entropy = float(result.values["entropy"].mean(dtype=np.float64))
        learner.entropy_coefficient = learner.loss.next_entropy_coefficient(learner.entropy_coefficient, entropy)
        results.append(result)
        if learner.passes.off_policy:
            moved.append(result.values["log_probs"] - sequences.values_of(chosen, batch.scores["log_probs"]))
        else:
            batch = batch.with_scores(result.values, chosen)
    shares = {"train/row_fraction": float(trained.mean()), "train/counted_fraction": float(batch.counted.mean())}
    metrics = {"train/lr": lr} | shares | update_metrics(results, tokens)
    if moved:
        metrics["train/kl_old_policy"] = old_policy_kl(np.concatenate(moved))
    return batch, metrics


def _with_coefficient(sequences: SequenceBatch, coefficient: float | None) -> SequenceBatch:
    if coefficient is None:
        return sequences
    return sequences.with_values(
        entropy_coefficient=np.full(sequences.num_sampled_tokens, coefficient, dtype=np.float32)
    )


def old_policy_kl(log_ratio: Array) -> float:
    """Returns KL(old || new) in nats per token, never negative, from log(new / old) of tokens that the old policy
    sampled; 0 without tokens."""
    log_ratio = log_ratio.astype(np.float64)
    return float((np.expm1(log_ratio) - log_ratio).sum() / max(1, len(log_ratio)))


def denominator(loss: lpreg.PolicyLoss, sequences: SequenceBatch, rows: Array) -> int:
    """Returns the count that the loss of a mini-batch is a mean over, dropped sequences included; at least 1."""
    if loss.denominator_counts == "selected_tokens":
        count = sequences.values_of(rows, sequences.values["selected"]).sum()
    else:
        count = len(rows) if loss.denominator_counts == "sequences" else sequences.sampled_lengths[rows].sum()
    return max(1, int(count))


def _check_finite(step: int, result: StepResult) -> None:
    if not np.isfinite([result.loss, result.grad_norm]).all():
        raise UserError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}. The update has damaged the "
            "weights, which were not saved: continue from the last checkpoint with resume=auto and a lower "
            "actor.optimizer.lr"
        )
