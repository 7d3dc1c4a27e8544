"""The function that selects tokens of a global batch by a method's rule.

Legend: T tokens of this rank; together the ranks of `group` hold the global batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lpreg._torch import torch
from lpreg.needs import SelectionRule
from lpreg.selection.exact import exact_mean, uniform
from lpreg.selection.ranking import Selection, lowest, select_highest, select_lowest, share_of

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor


def apply_rule(
    rule: SelectionRule,
    eligible: Tensor,
    *,
    log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    advantages: Tensor | None = None,
    token_ids: Tensor | None = None,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """Returns the tokens that `rule` chooses from the eligible tokens of the global batch, the same under any layout.

    Everything is known before the first backward: log-probs and entropies are those of the policy that generated the
    batch. Random rules draw by a hash of seed and token id. A ranking by covariance chooses exactly its share: many
    certain tokens of one response tie for the highest one, and as many of these are drawn as there is room for.
    "not_spurious" counts none of the ties at its threshold as low. Other rankings include all ties at the threshold.

    Args:
        eligible: [T] bool, the response tokens.
        log_probs: [T], of the sampled tokens; for "lowest_log_prob", "not_spurious" and both covariance rules.
        entropy: [T], nats; for "highest_entropy" and "not_spurious".
        advantages: [T]; for "not_spurious" and both covariance rules.
        token_ids: [T] int64, a different id for every token of the global batch, independent of the layout; for both
            random rules and ties of "highest_covariance". None, only without a group: the token's index in this call.
        seed: for draws; a different seed for every batch.
        group: the ranks that hold the global batch; each must call. None: this call holds the whole batch.

    Raises:
        ValueError: a missing or misshapen argument, or eligible values that cannot be ranked (on every rank).
    """
    tensors = {"log_probs": log_probs, "entropy": entropy, "advantages": advantages, "token_ids": token_ids}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != eligible.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but eligible has {list(eligible.shape)}")
    if rule.kind == "lowest_log_prob":
        return select_lowest(_need(rule, log_probs, "log_probs"), eligible, rule.fraction, group=group)
    if rule.kind == "highest_entropy":
        return select_highest(_need(rule, entropy, "entropy"), eligible, rule.fraction, group=group)
    if rule.kind == "not_spurious":
        return _not_spurious(rule, eligible, log_probs, entropy, advantages, group)
    if rule.kind == "random":
        return select_lowest(_draw(rule, eligible, token_ids, seed, group), eligible, rule.fraction, group=group)
    covariance = _covariance(
        _need(rule, advantages, "advantages"), _need(rule, log_probs, "log_probs"), eligible, group
    )
    if rule.kind == "highest_covariance":
        chosen = select_highest(covariance, eligible, rule.fraction, group=group)
        wanted = share_of(rule.fraction, chosen.population)
        if chosen.count <= wanted:
            return chosen
        draw = _draw(rule, eligible, token_ids, seed, group)
        return _without_surplus_ties(chosen, covariance == chosen.threshold, wanted, draw, group)
    if rule.covariance_range is None:
        raise ValueError("covariance_range: random_in_covariance needs one")
    low, high = rule.covariance_range
    inside = eligible & (covariance > low) & (covariance < high)
    # The count is a share of all tokens: tokens outside rank last, and are left out if the count reaches them.
    draw = _draw(rule, eligible, token_ids, seed, group).masked_fill(~inside, torch.inf)
    chosen = select_lowest(draw, eligible, rule.fraction, group=group)
    mask = chosen.mask & inside
    return Selection(chosen.threshold, mask, _count(mask, group), chosen.population)


def _without_surplus_ties(
    chosen: Selection, ties: Tensor, wanted: int, draw: Tensor, group: dist.ProcessGroup | None
) -> Selection:
    """Returns `wanted` of the chosen tokens: those beyond the threshold, and the ties at it with the lowest draw."""
    ties = ties & chosen.mask
    room = wanted - (chosen.count - _count(ties, group))
    cut = lowest(draw, ties, lambda _: room, group)
    return Selection(chosen.threshold, chosen.mask & ~ties | cut.mask, wanted, chosen.population)


def _not_spurious(
    rule: SelectionRule,
    eligible: Tensor,
    log_probs: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Returns all eligible tokens but the spurious ones; the threshold is the lowest entropy that is not low.

    Entropies are low strictly below the threshold, so tokens that tie across the share's end are not.
    """
    if rule.probability is None:
        raise ValueError("probability: not_spurious needs one")
    entropy = _need(rule, entropy, "entropy").detach()
    cut = lowest(entropy, eligible, lambda count: min(count, share_of(rule.fraction, count) + 1), group)
    rare = _need(rule, log_probs, "log_probs").detach() < math.log(rule.probability)
    mask = eligible & ~((entropy < cut.threshold) & rare & (_need(rule, advantages, "advantages") > 0))
    return Selection(cut.threshold, mask, _count(mask, group), cut.population)


def _need(rule: SelectionRule, value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} must be given: the selection rule {rule.kind} needs it")
    return value


def _covariance(advantages: Tensor, log_probs: Tensor, eligible: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the covariance [T] in fp64; 0 for tokens that are not eligible, whose values may be anything."""
    mean_advantage = exact_mean(advantages, eligible, "advantages", group)
    mean_log_prob = exact_mean(log_probs, eligible, "log_probs", group)
    covariance = (advantages.detach().double() - mean_advantage) * (log_probs.detach().double() - mean_log_prob)
    return torch.where(eligible, covariance, 0.0)


def _draw(
    rule: SelectionRule, eligible: Tensor, token_ids: Tensor | None, seed: int, group: dist.ProcessGroup | None
) -> Tensor:
    if token_ids is None and group is None:
        token_ids = torch.arange(eligible.numel(), device=eligible.device).view(eligible.shape)
    token_ids = _need(rule, token_ids, "token_ids")
    if token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64, got {token_ids.dtype}")
    return uniform(seed, token_ids)


def _count(mask: Tensor, group: dist.ProcessGroup | None) -> int:
    count = mask.sum()
    if group is not None:
        torch.distributed.all_reduce(count, group=group)
    return int(count)
