"""Metrics of a training step, from its rollouts and the actor's scores. Legend: N sequences, T sampled tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.actor.passes.results import add_up
from megatron_rl.batching.arrays import Array, Mask
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.rollout.rollouts import Rollouts, graded_responses
from megatron_rl.types import AgentResponse

if TYPE_CHECKING:
    from lpreg import Selection, SelectionRule
    from megatron_rl.cluster.actors import StepResult


TRAIN = ("ratio", "clip_fraction", "dual_clip_fraction", "reference_kl")
"""Metrics of a loss that several methods share."""
SHARES = ("selected_fraction", "lp_reg_selected_fraction", "spurious_fraction")
"""Metrics of a loss that are shares of the step's tokens."""


def rollout_metrics(rollouts: Rollouts, advantages: Array) -> dict[str, float]:
    """Reward and response length of everything that the step sampled. `advantages`: [N], of the trained responses.

    A response without a score has a length and no reward; without any score, there is no mean reward.
    """
    sampled = list(graded_responses(rollouts.sampled))
    scores = [score for group in rollouts.sampled for score in group.scores]
    lengths = [response.num_sampled_tokens for _, response, _ in sampled]
    known = {"reward/mean": float(np.mean(scores)), "reward/std": float(np.std(scores))} if scores else {}
    return known | {
        "reward/zero_advantage_fraction": 1 - rollouts.signal_fraction(advantages),
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(np.max(lengths)),
        "response_length/truncated_fraction": float(
            np.mean([response.finish_reason == "length" for _, response, _ in sampled])
        ),
        **agent_metrics([response for _, response, _ in sampled if isinstance(response, AgentResponse)]),
    }


def agent_metrics(responses: Sequence[AgentResponse]) -> dict[str, float]:
    """Turns, sequences and calls of tools per rollout of an agent; empty without an agent."""
    if not responses:
        return {}
    return {
        "agent/turns_mean": float(np.mean([response.turns for response in responses])),
        "agent/turns_max": float(np.max([response.turns for response in responses])),
        "agent/sequences_mean": float(np.mean([len(response.sequences) for response in responses])),
        "agent/tool_calls_mean": float(np.mean([response.tool_calls for response in responses])),
        "agent/tool_errors_mean": float(np.mean([response.tool_errors for response in responses])),
    }


def policy_metrics(sequences: SequenceBatch, scores: Mapping[str, Array], fresh: Mask) -> dict[str, float]:
    """Entropy, the share of tokens in the filter, and the gap between engine and actor, over the tokens that the actor
    scored (the scores are NaN elsewhere); empty if it scored none.

    `fresh` [T]: tokens that the weights in training sampled. Their gap should be 0; the gap of other tokens also shows
    how far the policy has moved.
    """
    if "entropy" not in scores:
        return {}
    known = np.isfinite(scores["entropy"])
    if not known.any():
        return {}
    everything = bool(known.all())

    def of_known(values: Array) -> Array:
        return values if everything else values[known]

    entropy, starts = scores["entropy"], sequences.sampled_starts.tolist()
    ends = (sequences.sampled_starts + sequences.sampled_lengths).tolist()
    parts = (
        of_sequence[np.isfinite(of_sequence)] for of_sequence in map(entropy.__getitem__, map(slice, starts, ends))
    )
    means = [part.mean(dtype=np.float64) for part in parts if len(part)]
    gap = np.abs(of_known(scores["log_probs"]) - of_known(sequences.values["rollout_log_probs"]))
    return {
        "entropy/token_mean": _mean(of_known(entropy)),
        "entropy/sequence_mean": float(np.mean(means)),
        "lpreg/kept_fraction": _mean(of_known(scores["in_filter"])),
        "lpreg/one_minus_z": _mean(-np.expm1(of_known(scores["log_z"]))),
    } | _gap_metrics(gap, of_known(fresh))


def _gap_metrics(gap: Array, fresh: Mask) -> dict[str, float]:
    """gap, fresh: [n]. A token whose generation failed may have no log-prob, and then no gap but NaN."""
    if np.isnan(gap).any():
        gap, fresh = gap[~np.isnan(gap)], fresh[~np.isnan(gap)]
    if not len(gap):
        return {}
    found = {"logprob/rollout_actor_abs_diff": _mean(gap), "logprob/rollout_actor_max_diff": float(gap.max())}
    fresh_gap = gap if fresh.all() else gap[fresh]
    return found | ({"logprob/fresh_abs_diff": _mean(fresh_gap)} if len(fresh_gap) else {})


def _mean(values: Array) -> float:
    """Returns the mean, computed in float64."""
    return float(values.mean(dtype=np.float64))


def rate_metrics(flops: float, seconds: float, ranks: int, peak: float | None) -> dict[str, float]:
    """Model operations per second while the actor works. `peak`: rate of one rank's device; None if it is not known."""
    if not flops or not seconds:
        return {}
    rate = flops / seconds / ranks
    known = {"perf/model_flops_utilisation": rate / peak} if peak else {}
    return {"perf/tflops_per_second_per_rank": rate / 1e12, "perf/step_tflops": flops / 1e12} | known


def selection_metrics(rule: SelectionRule, selection: Selection) -> dict[str, float]:
    """The threshold of the selection. A random rule has no threshold, and neither has a selection from no tokens."""
    if not selection.population:
        return {}
    if rule.kind == "lowest_log_prob":
        return {
            "lpreg/delta": float(np.exp(selection.threshold)),
            "lpreg/below_delta_fraction": selection.count / selection.population,
        }
    if rule.kind == "not_spurious":
        return {"lpreg/entropy_threshold": selection.threshold}
    if rule.kind in ("highest_entropy", "highest_covariance"):
        return {f"lpreg/{rule.kind.removeprefix('highest_')}_threshold": selection.threshold}
    return {}


def update_metrics(results: Sequence[StepResult], num_sampled_tokens: int) -> dict[str, float]:
    """Metrics of a step's updates. `num_sampled_tokens`: tokens of all mini-batches, dropped sequences included.

    Loss and gradient norm are means over the updates; a metric that counts tokens is a mean over the tokens of all
    updates.
    """
    metrics = {
        "train/updates": float(len(results)),
        "train/loss": float(np.mean([result.loss for result in results] or 0.0)),
        "train/grad_norm": float(np.mean([result.grad_norm for result in results] or 0.0)),
        "train/grad_norm_max": float(np.max([result.grad_norm for result in results] or 0.0)),
    }
    return metrics | loss_metrics(add_up(result.metrics for result in results), num_sampled_tokens)


def loss_metrics(parts: Mapping[str, tuple[float, float]], num_sampled_tokens: int) -> dict[str, float]:
    """The loss's own (total, count) pairs as means. Shares of tokens count all tokens, dropped sequences included."""
    metrics = {}
    for name, (total, count) in parts.items():
        if name in SHARES:
            count = num_sampled_tokens
        if name.startswith("rarity/") and not count:
            continue  # a mean over no tokens would be read as one of 0
        room = "train" if name in TRAIN or name.startswith("correction_") else "lpreg"
        metrics[f"{room}/{name}"] = total / count if count else 0.0
    return metrics
