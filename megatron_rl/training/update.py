"""The optimizer updates of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import lpreg
from megatron_rl.batching.mini_batches import mini_batches
from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.errors import UserError
from megatron_rl.observability.step_metrics import update_metrics
from megatron_rl.training.policies import Seen, acting_rows, fill
from megatron_rl.types import Sample

if TYPE_CHECKING:
    from megatron_rl.cluster.actors import StepResult
    from megatron_rl.run.run import Run


def update(
    run: Run, step: int, batch: SequenceBatch, samples: Sequence[Sample], advantages: Array, seen: Seen
) -> dict[str, float]:
    """All updates of a step, one a mini-batch. Returns their metrics; on-policy, fills in what the actor `seen` lacks.

    A mini-batch's loss is a mean over all of its tokens (or responses), those of dropped rows included; one without
    any acting row is no update. samples, advantages: [N].
    """
    settings, lr, acting = run.config.train, run.learning_rate(step), acting_rows(run, advantages)
    results: list[StepResult] = []
    tokens = 0
    moved: list[Array] = []
    groups = np.array([sample.group for sample in samples])
    for rows in mini_batches(
        groups, updates=settings.updates_per_rollout, epochs=settings.epochs_per_rollout, seed=run.sampling(step).seed
    ):
        tokens += int(batch.response_lengths[rows].sum())
        live = rows[acting[rows]]
        if not len(live):
            continue
        result = run.actors.train(
            batch.take(live), lr=lr, denominator=denominator(run.loss, batch.take(rows)), temperature=run.temperature
        )
        _check_finite(step, result)
        run.weight_version += 1
        results.append(result)
        if run.off_policy:
            moved.append(result.values["log_probs"] - seen["log_probs"][batch.token_index(live)])
        else:
            fill(seen, result.values, batch, live)
    metrics = {"train/lr": lr, "train/row_fraction": float(acting.mean())} | update_metrics(results, tokens)
    if moved:
        metrics["train/kl_old_policy"] = old_policy_kl(np.concatenate(moved))
    return metrics


def old_policy_kl(log_ratio: Array) -> float:
    """KL(old || new), nats a token, from log(new / old) of tokens that the old policy sampled; never negative."""
    log_ratio = log_ratio.astype(np.float64)
    return float((np.expm1(log_ratio) - log_ratio).mean())


def denominator(loss: lpreg.PolicyLoss, mini_batch: SequenceBatch) -> int:
    """What the loss is a mean over, dropped rows included."""
    if loss.denominator_counts == "selected_tokens":
        return max(1, int(mini_batch.values["selected"].sum()))
    return len(mini_batch) if loss.denominator_counts == "sequences" else mini_batch.num_response_tokens


def _check_finite(step: int, result: StepResult) -> None:
    if not np.isfinite([result.loss, result.grad_norm]).all():
        raise UserError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}. The weights are spoilt and were "
            f"not saved: go on from the last checkpoint with resume=auto and a lower actor.optimizer.lr"
        )
