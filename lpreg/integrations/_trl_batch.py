"""The inputs of a policy loss from TRL's batches.

A batch is a dict of tensors. TRL gives, for B rows and C response positions padded on the right: completion_ids [B, C],
completion_mask [B, C], tool_mask [B, C] (0 where a tool wrote the token), advantages [B] or [B, C], and with vLLM
importance_sampling_ratio [B, 1] or [B, C]. lpreg's trainer adds to a generation the statistics of the policy that
generated it (old_log_probs, old_entropy, old_log_z, old_in_filter), the selection and proxy_log_probs of another
policy, all [B, C], and that policy's proxy as one store per row. TRL then shuffles the rows and splits them into
micro-batches, which get the denominator update by update.

Legend: T tokens carry loss; flat tensors [T] hold them row after row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import LossInputs, PolicyLoss, apply_rule

Batch = dict[str, Any]
MAX_COLUMNS = 2**24
"""An upper bound on the tokens of a response."""


def loss_mask(batch: Batch) -> Tensor:
    """Returns [B, C] bool, the T tokens that carry loss."""
    mask: Tensor = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask


def advantages(batch: Batch, mask: Tensor) -> Tensor:
    """Returns TRL's advantages as [T]."""
    values: Tensor = batch["advantages"]
    return (values if values.dim() == 2 else values[:, None]).expand(mask.shape)[mask]


def select(loss: PolicyLoss, generation: Batch, *, seed: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Marks the tokens of the generation that the method's rule selects, over all ranks. Returns metrics of the
    threshold.

    seed: for rules that draw at random; different for every generation, the same on every rank.
    """
    rule = loss.selection
    if rule is None:
        return {}
    mask = loss_mask(generation)
    # A token's place in the whole generation; every rank has the same number of rows.
    first = 0 if group is None else dist.get_rank(group) * len(mask)
    rows = torch.arange(first, first + len(mask), device=mask.device)
    places = rows[:, None] * MAX_COLUMNS + torch.arange(mask.shape[1], device=mask.device)
    selection = apply_rule(
        rule,
        torch.ones_like(mask[mask]),
        log_probs=generation["old_log_probs"][mask],
        entropy=generation["old_entropy"][mask],
        advantages=advantages(generation, mask),
        token_ids=places[mask],
        seed=seed,
        group=group,
    )
    generation["selection"] = torch.zeros_like(mask).masked_scatter(mask, selection.mask)
    if rule.kind != "lowest_log_prob":
        return {}
    share = selection.count / max(selection.population, 1)
    return {"lpreg/delta": math.exp(selection.threshold), "lpreg/below_delta_fraction": share}


def set_denominator(loss: PolicyLoss, micro_batches: Sequence[Batch], group: dist.ProcessGroup | None) -> None:
    """Sets the denominator in the micro-batches of an update, counted over all of them and on all ranks."""
    counts = loss.denominator_counts
    if counts == "sequences":
        parts = [torch.ones_like(batch["completion_mask"][:, 0]) for batch in micro_batches]
    else:
        tokens = counts == "tokens"
        parts = [loss_mask(batch) if tokens else batch["selection"] for batch in micro_batches]
    total = torch.stack([part.sum() for part in parts]).sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    for batch in micro_batches:
        batch["denominator"] = max(int(total), 1)  # if nothing is counted, the mean is 0


def proxy_rows(loss: PolicyLoss, batch: Batch, mask: Tensor) -> Tensor:
    """Returns [T] bool, tokens whose proxy, or entropy inside the filter, the loss may read."""
    if loss.token_stats_kwargs().get("filter_entropy"):
        return torch.ones_like(mask[mask])
    rows = loss.uses_proxy(advantages(batch, mask))
    return rows & batch["selection"][mask] if "selection" in batch else rows


def loss_inputs(
    batch: Batch,
    mask: Tensor,
    stats: dict[str, Tensor],
    *,
    off_policy: bool,
    entropy_coefficient: float | None = None,
) -> LossInputs:
    """Returns the inputs of the loss. stats: statistics of the policy in training, [T]. Importance ratios multiply the
    advantages (see `lpreg.correction`). entropy_coefficient: of this update, if the method has adapted it."""
    weighted = advantages(batch, mask)
    if "importance_sampling_ratio" in batch:
        weighted = weighted * batch["importance_sampling_ratio"].expand(mask.shape)[mask]
    old = ("old_log_probs", "old_log_z", "old_in_filter") if off_policy else ()
    rows = torch.arange(len(mask), device=mask.device)
    return LossInputs(
        **stats,
        **{name: batch[name][mask] for name in (*old, "proxy_log_probs", "selection") if name in batch},
        advantages=weighted,
        sequence_ids=rows[:, None].expand(mask.shape)[mask],
        entropy_coefficient=None if entropy_coefficient is None else torch.full_like(weighted, entropy_coefficient),
        denominator=batch["denominator"],
    )
