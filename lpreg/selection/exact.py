"""Means and random numbers that do not depend on how tokens are split over ranks and micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpreg._torch import torch
from lpreg.selection.ranking import on_this_rank

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

LARGEST = 2.0**20
"""Largest absolute value, far beyond any log-prob or advantage. With HIGH_BITS, an int64 sum has room for 2**27
tokens."""
HIGH_BITS, LOW_BITS = 16, 34


def exact_mean(values: Tensor, eligible: Tensor, name: str, group: dist.ProcessGroup | None) -> float:
    """Returns the mean of the eligible `values` [T] over all ranks: the same bits in any order and on any layout; 0 if
    there is no value.

    Each value is rounded to a multiple of 2**-50 and added as an integer, in two parts that cannot overflow.

    Raises:
        ValueError: an eligible value on any rank (then on every rank) that is not finite, or beyond 2**20.
    """
    bad = eligible & ~(values.detach().abs() <= LARGEST)
    scaled = values.detach()[eligible & ~bad].double() * 2.0**HIGH_BITS
    high = scaled.floor()
    low = ((scaled - high) * 2.0**LOW_BITS).round()
    sums = torch.stack([high.long().sum(), low.long().sum(), eligible.sum(), bad.sum()])
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    high_sum, low_sum, count, bad_count = sums.tolist()
    if bad_count:
        raise ValueError(
            f"{name}: {bad_count} eligible values are NaN, infinite or beyond {LARGEST:g}, {on_this_rank(bad)}"
        )
    return float(((high_sum << LOW_BITS) + low_sum) / (count << (HIGH_BITS + LOW_BITS))) if count else 0.0


def uniform(seed: int, token_ids: Tensor) -> Tensor:
    """Returns [T] fp64 in [0, 1), a hash of the seed and each token's id: SplitMix64 (Steele, Lea and Flood, OOPSLA
    2014)."""
    start = _mix(torch.tensor(seed, device=token_ids.device))
    mixed = _mix(start + token_ids * _signed(0x9E3779B97F4A7C15))
    return _shift(mixed, 11).double() * 2.0**-53


def _mix(bits: Tensor) -> Tensor:
    """Mixes the bits of the hash; integer products wrap around as the hash requires."""
    bits = (bits ^ _shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shifts to the right and fills with zeros; the shift of int64 itself copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - (1 << 64)
