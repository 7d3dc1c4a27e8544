"""A policy loss of lpreg as one that verl calls (its `register_policy_loss`). Imports torch, but not verl.

verl passes the log-probs of one micro-batch and the counts of the global batch to such a function. So a method can be
used if it needs no more: grpo, clip_higher, dual_clip, gspo, cispo, dppo, drpo, sapo, up, vespo. The other methods rank
tokens over the global batch, or read the filter or the entropy's gradient, which verl does not provide.

Legend: B responses of a micro-batch, L their padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpreg import LossInputs, PolicyLoss
from lpreg.losses.base import WrappedLoss

VerlLoss = Callable[..., tuple[Tensor, dict[str, float]]]


def policy_loss(loss: PolicyLoss) -> VerlLoss:
    """Returns a function of verl's signature (0.10): old_log_prob, log_prob, advantages [B, L], response_mask [B, L],
    loss_agg_mode, config, rollout_is_weights [B, L] or None -> the loss, and metrics under `actor/`.

    The mean is exact over the global batch. Importance weights multiply the advantages. `loss_agg_mode` must name the
    method's own aggregation, since verl's KL and entropy terms follow it.

    Raises:
        ValueError: a method that needs what verl does not provide; when called, another loss_agg_mode.
    """
    if loss.selection is not None or loss.proxy_source is not None or loss.token_stats_kwargs():
        raise ValueError(
            f"{loss.name} needs more than log-probs (tokens ranked over the global batch, the filter's mass or the "
            "entropy's gradient), which verl does not pass to a policy loss; possible are grpo, clip_higher, "
            "dual_clip, gspo, cispo, dppo, drpo, sapo, up and vespo"
        )
    if isinstance(loss, WrappedLoss):
        raise ValueError(f"verl has {loss.name} of its own: hand over the method without it")
    agg_mode = _agg_mode(loss)

    def verl_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if loss_agg_mode != agg_mode:
            raise ValueError(
                f"{loss.name} as set up is a {agg_mode}: set actor.loss_agg_mode to it, not {loss_agg_mode}"
            )
        mask = response_mask.bool()
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
        rows = torch.arange(len(mask), device=mask.device)[:, None].expand(mask.shape)
        batch = getattr(config, "global_batch_info", {})
        output = loss(
            LossInputs(
                log_probs=log_prob[mask],
                old_log_probs=old_log_prob[mask],
                advantages=weighted[mask],
                sequence_ids=rows[mask],
                denominator=_denominator(loss, mask, batch),
            )
        )
        # The loss is a share of a global mean, but verl averages gradients over data-parallel ranks.
        ranks = batch.get("dp_size", 1)
        return output.loss * ranks, {f"actor/{name}": mean.value for name, mean in output.metrics.items()}

    return verl_loss


def _agg_mode(loss: PolicyLoss) -> str:
    """Returns verl's name of the mean that the method takes."""
    if loss.denominator_counts == "tokens":
        return "token-mean"
    return "seq-mean-token-mean" if not loss.token_separable else "seq-mean-token-sum-norm"


def _denominator(loss: PolicyLoss, mask: Tensor, batch: dict[str, Any]) -> float:
    """Returns verl's count over the global batch, or this micro-batch's count if verl gives none, as without data
    parallelism."""
    tokens = loss.denominator_counts == "tokens"
    counted = batch.get("batch_num_tokens" if tokens else "global_batch_size")
    if counted is None and batch.get("dp_size", 1) > 1:
        raise ValueError("config.global_batch_info must hold the counts of the global batch where dp_size is above 1")
    here = mask.sum() if tokens else mask.any(1).sum()
    return max(float(here if counted is None else counted), 1.0)
