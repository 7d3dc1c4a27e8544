"""What a policy loss gets to see of a micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lpreg
from lpreg import LossInputs, Mean
from megatron_rl.actor.micro_batch import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rl.config.algorithm import CorrectionSettings


def loss_inputs(
    stats: lpreg.TokenStats, part: MicroBatch, denominator: float, correction: CorrectionSettings
) -> tuple[LossInputs, dict[str, Mean]]:
    """The loss's inputs, corrected for the gap between engine and actor, and metrics of the correction."""
    values = part.values
    advantages, mask, metrics = _corrected(stats, part, correction)
    inputs = LossInputs(
        log_probs=stats.log_probs,
        old_log_probs=values.get("old_log_probs"),  # None: one update a rollout, so the old policy is this one
        advantages=advantages,
        mask=mask,
        entropy=stats.entropy,
        log_z=stats.log_z,
        kept=stats.kept,
        old_log_z=values.get("old_log_z"),
        old_kept=values.get("old_kept"),
        selection=values.get("selected"),
        proxy_log_probs=values.get("proxy_log_probs"),
        proxy_kl=stats.proxy_kl,
        reference_log_probs=values.get("reference_log_probs"),
        sequence_ids=part.sequence_ids,
        denominator=denominator,
    )
    return inputs, metrics


def _corrected(
    stats: lpreg.TokenStats, part: MicroBatch, correction: CorrectionSettings
) -> tuple[Tensor, Tensor | None, dict[str, Mean]]:
    """Weighted advantages, which tokens count (None: all), and metrics. The actor is that before the first update.

    A token left out, or of weight 0, still counts in the mean: only the numerator changes.
    """
    advantages, mask = part.values["advantages"], None
    metrics: dict[str, Mean] = {}
    if correction.weights == "none" and not correction.reject_sequences:
        return advantages, mask, metrics
    actor, rollout = part.values.get("old_log_probs", stats.log_probs.detach()), part.values["rollout_log_probs"]
    if correction.weights != "none":
        if correction.weights == "truncated":
            weights = lpreg.truncated_weights(actor, rollout, high=correction.high)
        else:
            weights = lpreg.masked_weights(actor, rollout, low=correction.low, high=correction.high)
        metrics["correction_weight"] = Mean.of(weights)
        metrics["correction_bounded_fraction"] = Mean.of(weights != (actor - rollout).exp())
        advantages = advantages * weights
    if correction.reject_sequences:
        mask = lpreg.accepted_sequences(
            actor, rollout, part.sequence_ids, low=correction.sequence_low, high=correction.sequence_high
        )
        metrics["correction_rejected_fraction"] = Mean.of(~mask)
    return advantages, mask, metrics
