"""Statistics of rows from the passes over them, the same for whole logits and for chunks of them.

Ranks exchange only numbers per row, which are all-gathered and combined in rank order, so that every rank holds the
same bits; an all-reduce does not guarantee that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg.statistics.checks import check_settings, check_targets, refuse
from lpreg.statistics.proxy_store import ProxyStore, ShardProxy
from lpreg.statistics.rows import filter_masses, summarise
from lpreg.statistics.shard import Shard

EntropyMode = Literal["metric", "grad", "none"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the caller asked for, and which columns this rank holds."""

    first: int
    """Token id of this rank's column 0."""
    columns: int
    """True vocabulary columns of this rank."""
    temperature: float
    log_cut: float
    """log min_p, or log fixed_tau if `fixed`."""
    fixed: bool
    tp_group: dist.ProcessGroup | None
    entropy: EntropyMode

    @property
    def with_entropy(self) -> bool:
        return self.entropy != "none"

    def shard_proxy(self, proxy: ProxyStore | None) -> ShardProxy | None:
        return None if proxy is None else proxy.shard(self.first, self.columns)


def resolve(
    local: int,
    targets: Tensor,
    temperature: float,
    min_p: float,
    fixed_tau: float | None,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    entropy: EntropyMode,
) -> tuple[Settings, Tensor]:
    """Returns checked settings for `local` columns on this rank, and `targets` [T] as columns of this rank's slice."""
    check_settings(temperature, min_p, fixed_tau, entropy)
    ranks, rank = ranks_of(tp_group), 0 if tp_group is None else dist.get_rank(tp_group)
    vocab_size = local * ranks if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= local * ranks:
        raise ValueError(f"vocab_size is {vocab_size}, but the logits hold {local} columns on each of {ranks} ranks")
    check_targets(targets, vocab_size)
    settings = Settings(
        first=rank * local,
        columns=min(max(vocab_size - rank * local, 0), local),
        temperature=float(temperature),
        log_cut=math.log(min_p if fixed_tau is None else fixed_tau),
        fixed=fixed_tau is not None,
        tp_group=tp_group,
        entropy=entropy,
    )
    return settings, targets - rank * local


def ranks_of(tp_group: dist.ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


@dataclass(frozen=True, slots=True)
class Totals:
    """The results of one read of the rows, combined over ranks; all [T]."""

    max_logit: Tensor
    log_total: Tensor
    """log sum exp(x - max)."""
    entropy: Tensor
    target: Tensor
    """x of the sampled token."""
    log_sum: Tensor
    threshold: Tensor
    """The filter keeps x >= threshold."""


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Everything that the caller or the backward needs of each row; all [T]."""

    log_probs: Tensor
    entropy: Tensor
    log_z: Tensor
    in_filter: Tensor
    max_logit: Tensor
    log_sum: Tensor
    threshold: Tensor
    proxy_kl: Tensor
    """0 where no proxy is stored."""

    @classmethod
    def join(cls, parts: Sequence[RowStatistics]) -> RowStatistics:
        """Returns the statistics of consecutive chunks of rows as one."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def statistics(
    shard: Shard, log_z_rows: Tensor | None, settings: Settings, proxy: ShardProxy | None = None
) -> RowStatistics:
    """Returns the statistics of the rows of `shard`, by two small collectives. log_sum shows rows that are not finite,
    see `check_finite`."""
    totals = combine(summarise(shard, settings.with_entropy), settings)
    rows = None if log_z_rows is None else log_z_rows.nonzero().squeeze(1)
    masses = filter_masses(shard, rows, totals.threshold, totals.log_sum)
    if proxy is None:
        return finish(totals, masses, rows, settings)
    return finish(totals, masses, rows, settings, proxy.stored, proxy.divergence(shard, totals.log_sum))


def combine(pack: Tensor, settings: Settings) -> Totals:
    """Returns totals over all ranks from this rank's result of `summarise` [4, T], by one collective."""
    high, total, weighted, target = _gather(pack, settings.tp_group).unbind(1)
    max_logit = high.amax(0)
    shift = torch.where(high == -torch.inf, 0.0, high - max_logit)
    scale = shift.exp()
    total_all = (total * scale).sum(0)
    weighted_all = ((weighted + shift * total) * scale).sum(0)
    log_total = total_all.log()
    log_sum = max_logit + log_total
    # p_v >= min_p * max p and p_v >= tau are both thresholds on x, so the filter needs no softmax.
    threshold = (log_sum if settings.fixed else max_logit) + settings.log_cut
    return Totals(max_logit, log_total, log_total - weighted_all / total_all, target.amax(0), log_sum, threshold)


def finish(
    totals: Totals,
    masses: Tensor,
    rows: Tensor | None,
    settings: Settings,
    stored: Tensor | None = None,
    divergence: Tensor | None = None,
) -> RowStatistics:
    """Returns the statistics with log Z from this rank's result of `filter_masses` [2, R], for the given rows or (None)
    all rows; and with KL(q || p) from this rank's part of it [S] in the S `stored` rows ([T] bool), if given. One
    collective."""
    local = masses.flatten() if divergence is None else torch.cat([masses.flatten(), divergence])
    whole = _gather(local, settings.tp_group).sum(0)
    inside, outside = whole[: masses.numel()].view_as(masses)
    proxy_kl = torch.zeros_like(totals.log_sum)
    if stored is not None:
        proxy_kl.masked_scatter_(stored, whole[masses.numel() :])
    # On a peaked row the mass inside rounds to 1 and its log keeps no digits; the mass outside keeps them all.
    log_z = torch.where(outside < 0.5, torch.log1p(-outside), inside.log())
    if rows is not None:
        log_z = torch.zeros_like(totals.log_sum).index_copy_(0, rows, log_z)
    return RowStatistics(
        log_probs=(totals.target - totals.max_logit) - totals.log_total,
        entropy=totals.entropy,
        log_z=log_z,
        in_filter=totals.target >= totals.threshold,
        max_logit=totals.max_logit,
        log_sum=totals.log_sum,
        threshold=totals.threshold,
        proxy_kl=proxy_kl,
    )


def _gather(local: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Returns the values of all ranks: [...] -> [ranks, ...]."""
    if tp_group is None or local.numel() == 0:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(ranks_of(tp_group))]
    dist.all_gather(parts, local, group=tp_group)
    return torch.stack(parts)


def check_finite(log_sum: Tensor, first: int = 0) -> None:
    """Raises ValueError for rows that are not finite; `first` is the number of the first row. Called after the gather,
    so that every rank raises and no rank waits for the others."""
    bad = ~torch.isfinite(log_sum)

    def message() -> str:
        rows: Sequence[int] = (bad.nonzero().squeeze(1)[:5] + first).tolist()
        return f"logits of {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf, or only -inf; first rows: {rows}"

    refuse(bad.any(), message)
