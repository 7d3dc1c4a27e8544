"""The batch of a step: the one carrier from the rollouts to the record. Legend: N sequences, T sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.arrays import Array, Indices, Mask
from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.training.advantages import advantages_of, counted_responses, overlong_penalty
from megatron_rl.types import Response, RewardResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from megatron_rl.config import Config

PolicyScores = dict[str, Array]
"""Name -> float32 [T]: log_probs, entropy, log_z and in_filter of each sampled token, under the policy before the
first update; NaN where the actor did not score the token."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Everything that a step knows about the sequences that it trains on."""

    sequences: SequenceBatch
    """The sequences with their values per token, `advantages` and `rollout_log_probs` among them."""
    groups: Indices
    """[N], number of the group that each sequence belongs to."""
    advantages: Array
    """float64 [N]."""
    fresh: Mask
    """[T], True for tokens that were sampled by the very weights that the step trains, without older weights' cache."""
    scores: PolicyScores = field(default_factory=dict)
    counted: Mask = None  # type: ignore[assignment]
    """[N], False for sequences that neither the loss nor its denominators know of, because their reward is missing;
    see `training.advantages.counted_responses`. Default: all are counted."""

    def __post_init__(self) -> None:
        counted = np.ones(len(self.sequences), dtype=bool) if self.counted is None else self.counted
        object.__setattr__(self, "counted", counted)

    def __len__(self) -> int:
        return len(self.sequences)

    def with_values(self, **values: Array) -> TrainingBatch:
        """Returns the batch with more values per token."""
        return replace(self, sequences=self.sequences.with_values(**values))

    def with_scores(self, part: PolicyScores, rows: Indices) -> TrainingBatch:
        """Returns the batch with the scores of some of its sequences filled in."""
        scores = dict(self.scores)
        for name, values in part.items():
            known = scores.get(name)
            filled = np.full(len(self.fresh), np.nan, dtype=np.float32) if known is None else known.copy()
            self.sequences.set_values(filled, rows, values)
            scores[name] = filled
        return replace(self, scores=scores)


def training_batch(
    config: Config, rollouts: Rollouts, shaped: Callable[[Sequence[RewardResult]], list[float]]
) -> tuple[TrainingBatch, dict[str, float]]:
    """Returns the batch of the rollouts to train on, with advantages, and metrics. `shaped`: results that have a score
    -> rewards."""
    responses = rollouts.responses
    counts = np.array([len(response.sequences) for _, response, _ in responses], dtype=np.int64)
    firsts = np.cumsum(counts) - counts  # the first sequence of each response
    rewarded = np.array([result.has_score for _, _, result in responses], dtype=bool)
    rewards = np.full(len(responses), np.nan)
    rewards[rewarded] = shaped([result for _, _, result in responses if result.has_score])
    sequences = sequences_of((prompt.token_ids, response) for prompt, response, _ in responses)
    groups = rollouts.group_numbers
    counted = np.repeat(counted_responses(rewards, groups[firsts]), counts)
    metrics = {}
    if config.algorithm.overlong.buffer_tokens:
        penalty = overlong_penalty(config, np.add.reduceat(sequences.sampled_lengths, firsts))
        rewards = rewards + penalty
        if rewarded.any():
            metrics["reward/overlong_penalty"] = float(penalty[rewarded].mean())
    advantages = np.repeat(advantages_of(config.algorithm, rewards, groups[firsts]), counts)
    fresh = [
        sequence.sampled(_fresh(config, rollouts, group, sequence))
        for group in rollouts.groups
        for response in group.responses
        for sequence in response.sequences
    ]
    batch = TrainingBatch(
        sequences.with_values(advantages=sequences.per_token(advantages.astype(np.float32))),
        groups,
        advantages,
        np.concatenate([np.zeros(0, dtype=bool), *fresh]),
        counted=counted,
    )
    return batch, metrics


def _fresh(config: Config, rollouts: Rollouts, group: Group, sequence: Response) -> Mask:
    """[n], `TrainingBatch.fresh` of the tokens of a sequence.

    An engine that keeps requests across updates goes on with the cache of older weights. A request that waited in the
    engine during the update, before its first token, may use what the older weights cached of its prompt.
    """
    if config.keeps_requests and (sequence.version_changes or group.since != rollouts.weight_version):
        return np.zeros(len(sequence), dtype=bool)
    return sequence.sampled_by(rollouts.weight_version)
