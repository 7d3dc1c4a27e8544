"""Exact ranking of token values over every rank: which tokens are the lowest or highest `fraction` of a global batch.

Radix select on bits that order like the numbers: 16 bits at a time, with one all-reduce of integer histograms each.
Sums of integers make the result the same on every rank, however the tokens are split over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lpreg._torch import torch

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The chosen tokens of this rank, and counts over all ranks."""

    threshold: float
    """The last value chosen; -inf (lowest) or +inf (highest) if no token is eligible on any rank."""
    mask: Tensor
    """bool, in the shape of `values`: this rank's chosen tokens."""
    count: int
    """Number of tokens chosen over all ranks, ties included."""
    population: int
    """Number of eligible tokens over all ranks."""


def select_lowest(
    values: Tensor, eligible: Tensor, fraction: float, *, group: dist.ProcessGroup | None = None
) -> Selection:
    """Selects the lowest `share_of(fraction, population)` eligible values over all ranks of `group`, and their ties.

    The selection costs two all-reduces of 512 KiB (four for fp64), whatever the number of tokens. -0.0 equals 0.0; -inf
    and +inf rank as numbers; a rank may hold no token.

    Args:
        values: any shape; bf16, fp16, fp32 or fp64, the same on every rank.
        eligible: bool, in the shape of `values`: the population.
        fraction: in (0, 1].
        group: the ranks to rank over; each must call. None: only this process.

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
    return lowest(values.detach(), eligible, lambda population: share_of(fraction, population), group)


def lowest(
    values: Tensor, eligible: Tensor, count_of: Callable[[int], int], group: dist.ProcessGroup | None
) -> Selection:
    """Selects the lowest values, and their ties, see `select_lowest`; count_of: population -> how many, from 1 to the
    population."""
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
        histogram[DIGITS] = nan.sum()  # reduced with the rest, so that every rank raises and no rank waits
        if group is not None:
            torch.distributed.all_reduce(histogram, group=group)
        if first:
            if count := int(histogram[DIGITS]):
                raise ValueError(f"values: {count} eligible tokens are NaN, {on_this_rank(nan)}; a NaN has no rank")
            population = int(histogram.sum())
            if population == 0:
                return Selection(-torch.inf, torch.zeros_like(eligible), 0, 0)
            rank_of_last = count_of(population)
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
    """Selects the highest values, see `select_lowest`."""
    lowest = select_lowest(-values, eligible, fraction, group=group)
    return Selection(-lowest.threshold, lowest.mask, lowest.count, lowest.population)


def share_of(fraction: float, population: int) -> int:
    """Returns the whole number of tokens that are a share of the population, at least 1.

    The fraction is the decimal number that is written: .29 of 100 tokens are 29, which floats make 28.
    """
    return max(1, math.floor(Fraction(str(fraction)) * population))


def on_this_rank(bad: Tensor) -> str:
    """Returns where the bad values of this rank are, for a message that every rank raises; bad: bool, any shape."""
    here = bad.flatten().nonzero().squeeze(1)[:5].tolist()
    return f"the first on this rank at {here}" if here else "none of them on this rank"


def _ordered_bits(values: Tensor) -> Tensor:
    """Returns integers that order like the floats: negative floats count down, so their magnitude bits are flipped."""
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
