"""A training step's metrics, from its batch and what the actor said of it. Legend: N rows, T response tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.actor.passes.results import add_up
from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.types import Sample

if TYPE_CHECKING:
    from lpreg import Selection, SelectionRule
    from megatron_rl.cluster.actors import StepResult


TRAIN = ("ratio", "clip_fraction", "dual_clip_fraction", "reference_kl")
"""A loss's metrics that are no business of one method."""


def rollout_metrics(samples: Sequence[Sample], teaching: Collection[int]) -> dict[str, float]:
    """Reward and response length of all that the step sampled; teaching: the groups of it with an advantage."""
    rewards = [sample.reward.score for sample in samples if sample.reward is not None]
    lengths = [len(sample.generation.token_ids) for sample in samples]
    groups = {sample.group for sample in samples}
    return {
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/zero_advantage_fraction": 1 - len(groups & set(teaching)) / len(groups),
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(np.max(lengths)),
        "response_length/truncated_fraction": float(np.mean([s.generation.finish_reason == "length" for s in samples])),
    }


def policy_metrics(batch: SequenceBatch, seen: Mapping[str, Array], fresh: Array) -> dict[str, float]:
    """Entropy, the kept share and the rollout-actor gap over the tokens the actor saw (NaN where it did not).

    fresh: [T] bool, the tokens that the weights in training sampled. Their gap should be none; of the others it is how
    far the policy has moved as well.
    """
    if "entropy" not in seen:
        return {}
    entropy = np.asarray(seen["entropy"], dtype=np.float64)
    known = np.isfinite(entropy)
    row_of = batch.per_token(np.arange(len(batch)))
    sums = np.bincount(row_of[known], weights=entropy[known], minlength=len(batch))
    counts = np.bincount(row_of[known], minlength=len(batch))
    gaps = np.abs(np.asarray(seen["log_probs"], dtype=np.float64) - batch.values["rollout_log_probs"])
    gap, fresh_gap = gaps[known], gaps[known & fresh]
    return {
        "entropy/token_mean": float(entropy[known].mean()),
        "entropy/sequence_mean": float((sums[counts > 0] / counts[counts > 0]).mean()),
        "lpreg/kept_fraction": float(np.asarray(seen["kept"], dtype=np.float64)[known].mean()),
        "lpreg/one_minus_z": float(-np.expm1(np.asarray(seen["log_z"], dtype=np.float64)[known]).mean()),
        "logprob/rollout_actor_abs_diff": float(gap.mean()),
        "logprob/rollout_actor_max_diff": float(gap.max()),
    } | ({"logprob/fresh_abs_diff": float(fresh_gap.mean())} if len(fresh_gap) else {})


def rate_metrics(flops: float, seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    """Model operations a second while the actor works; peak: of one rank's device, None where it is not known."""
    if not flops or not seconds:
        return {}
    rate = flops / seconds / ranks
    known = {"perf/model_flops_utilisation": rate / peak} if peak else {}
    return {"perf/tflops_per_second_per_rank": rate / 1e12, "perf/step_tflops": flops / 1e12} | known


def selection_metrics(rule: SelectionRule, selection: Selection) -> dict[str, float]:
    """Where the ranking of a batch was cut; a random rule has no such place."""
    if rule.kind == "lowest_log_prob":
        return {
            "lpreg/delta": float(np.exp(selection.threshold)),
            "lpreg/below_delta_fraction": selection.count / selection.population,
        }
    if rule.kind in ("highest_entropy", "highest_covariance"):
        return {f"lpreg/{rule.kind.removeprefix('highest_')}_threshold": selection.threshold}
    return {}


def update_metrics(results: Sequence[StepResult], num_response_tokens: int) -> dict[str, float]:
    """Of a step's updates; num_response_tokens: of all their mini-batches, dropped rows included.

    Loss and gradient norm are means over the updates; what is counted in tokens is a mean over the tokens of all.
    """
    metrics = {
        "train/updates": float(len(results)),
        "train/loss": float(np.mean([result.loss for result in results] or 0.0)),
        "train/grad_norm": float(np.mean([result.grad_norm for result in results] or 0.0)),
        "train/grad_norm_max": float(np.max([result.grad_norm for result in results] or 0.0)),
    }
    return metrics | loss_metrics(add_up(result.metrics for result in results), num_response_tokens)


def loss_metrics(parts: Mapping[str, tuple[float, float]], num_response_tokens: int) -> dict[str, float]:
    """The loss's own (total, count) pairs as means. Shares of tokens are of all tokens, dropped rows included."""
    metrics = {}
    for name, (total, count) in parts.items():
        if name == "selected_fraction":
            count = num_response_tokens
        room = "train" if name in TRAIN or name.startswith("correction_") else "lpreg"
        metrics[f"{room}/{name}"] = total / count if count else 0.0
    return metrics
