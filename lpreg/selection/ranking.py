"""Exact ranking of token values over every rank: which tokens are the lowest or highest `fraction` of a global batch.

Radix select on bits that order like the numbers: 16 bits at a time, one all-reduce of integer histograms each. Integer
sums make the result the same on every rank and whatever way the tokens are laid out over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg._checks import on_this_rank

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen tokens of this rank, and what is known of all ranks."""

    threshold: float
    """The last value chosen; -inf (lowest) or +inf (highest) when nothing is eligible anywhere."""
    mask: Tensor
    """bool, the shape of `values`: this rank's chosen tokens."""
    count: int
    """Tokens chosen over all ranks, ties included."""
    population: int
    """Eligible tokens over all ranks."""


def select_lowest(
    values: Tensor, eligible: Tensor, fraction: float, *, group: dist.ProcessGroup | None = None
) -> Selection:
    """The lowest max(1, int(fraction * population)) of the eligible values over all ranks of `group`, and their ties.

    Costs two all-reduces of 512 KiB (four for fp64), whatever the number of tokens. -0.0 equals 0.0; -inf and +inf rank
    as numbers; a rank may hold no token.

    Args:
        values: any shape; bf16, fp16, fp32 or fp64, the same on every rank.
        eligible: bool, the shape of `values`: the population.
        fraction: in (0, 1].
        group: the ranks to rank over; each must call. None: this process alone.

    Raises:
        ValueError: bad arguments, or an eligible NaN on any rank (then on every rank).
    """
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    if eligible.dtype != torch.bool or eligible.shape != values.shape or eligible.device != values.device:
        raise ValueError(
            f"eligible must be bool of shape {list(values.shape)} on {values.device} to fit the values, "
            f"got {eligible.dtype} of shape {list(eligible.shape)} on {eligible.device}"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    values = values.detach()
    wide = values if values.dtype == torch.float64 else values.float()
    nan = eligible & wide.isnan()
    usable = eligible & ~nan
    ordered = _ordered_bits(wide.flatten() if usable.all() else wide[usable])

    prefix, below, rank_of_last, population = 0, 0, 0, 0
    total_bits = torch.finfo(wide.dtype).bits
    for shift in range(total_bits - DIGIT_BITS, -1, -DIGIT_BITS):
        first = shift == total_bits - DIGIT_BITS
        digits = (ordered >> shift) + DIGITS // 2 if first else (ordered >> shift) & (DIGITS - 1)
        histogram = torch.bincount(digits, minlength=DIGITS + 1)
        histogram[DIGITS] = nan.sum()  # rides along, so that every rank learns of it and none is left waiting
        if group is not None:
            dist.all_reduce(histogram, group=group)
        if first:
            if count := int(histogram[DIGITS]):
                raise ValueError(f"values: {count} eligible tokens are NaN, {on_this_rank(nan)}; a NaN has no rank")
            population = int(histogram.sum())
            if population == 0:
                return Selection(-torch.inf, torch.zeros_like(eligible), 0, 0)
            rank_of_last = max(1, int(fraction * population))
        cumulative = histogram[:DIGITS].cumsum(0)
        digit = int(torch.searchsorted(cumulative, rank_of_last - below))
        in_digit = int(histogram[digit])
        below += int(cumulative[digit]) - in_digit
        prefix = digit - DIGITS // 2 if first else (prefix << DIGIT_BITS) | digit
        ordered = ordered[ordered >> shift == prefix]
    threshold = _from_ordered_bits(prefix, wide.dtype)
    return Selection(threshold, eligible & (wide <= threshold), below + in_digit, population)


def select_highest(
    values: Tensor, eligible: Tensor, fraction: float, *, group: dist.ProcessGroup | None = None
) -> Selection:
    """As `select_lowest`, from the top."""
    lowest = select_lowest(-values, eligible, fraction, group=group)
    return Selection(-lowest.threshold, lowest.mask, lowest.count, lowest.population)


def _ordered_bits(values: Tensor) -> Tensor:
    """Signed integers that order as the floats do: negative floats count down, so their magnitude bits are flipped."""
    integer, magnitude = _integer_type(values.dtype)
    bits = (values + 0.0).view(integer)  # + 0.0 turns -0.0 into 0.0
    return torch.where(bits < 0, bits ^ magnitude, bits)


def _from_ordered_bits(ordered: int, dtype: torch.dtype) -> float:
    integer, magnitude = _integer_type(dtype)
    bits = ordered ^ magnitude if ordered < 0 else ordered
    return float(torch.tensor(bits, dtype=integer).view(dtype))


def _integer_type(dtype: torch.dtype) -> tuple[torch.dtype, int]:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return integer, torch.iinfo(integer).max
