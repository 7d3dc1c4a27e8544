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
from lpreg.statistics.shard import RowScale, Shard

NUCLEUS_TOKENS = 512
"""Most tokens of a nucleus: each rank sends as many logits per row. A row that would need more keeps the likeliest."""

EntropyMode = Literal["metric", "grad", "none"]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tokens the filter keeps: a threshold of p relative to the largest p unless another field is set."""

    min_p: float = 0.02
    """Keeps p >= min_p * max p."""
    fixed_tau: float | None = None
    """Keeps p >= fixed_tau."""
    top_k: int | None = None
    """Keeps the k likeliest tokens, and those that tie with the last of them."""
    top_p: float | None = None
    """Keeps the likeliest tokens that together have this probability, NUCLEUS_TOKENS of them at most, and those that
    tie with the last of them."""

    @property
    def likeliest(self) -> int:
        """Number of the largest x of a row that must be known."""
        return self.top_k or (0 if self.top_p is None else NUCLEUS_TOKENS)

    def threshold(self, max_logit: Tensor, log_total: Tensor, likeliest: Tensor) -> Tensor:
        """[T], the smallest x that is kept. likeliest: [self.likeliest, T], the largest x of the whole vocabulary in
        falling order."""
        # p_v >= min_p * max p and p_v >= tau are both thresholds on x, so the filter needs no softmax.
        if self.fixed_tau is not None:
            return max_logit + log_total + math.log(self.fixed_tau)
        if not self.likeliest:
            return max_logit + math.log(self.min_p)
        last = likeliest[-1]
        if self.top_p is not None:
            p = ((likeliest - max_logit) - log_total).exp()
            count = ((p.cumsum(0) - p) < self.top_p).sum(0)  # a token is in if those before it have too little
            last = likeliest.gather(0, (count[None] - 1).clamp_min(0))[0]  # 0 only in a row of NaN, which is refused
        return last.clamp_min(torch.finfo(last.dtype).min)  # impossible tokens are never inside


@dataclass(frozen=True, slots=True)
class Settings:
    """What the caller asked for, and which columns this rank holds."""

    first: int
    """Token id of this rank's column 0."""
    columns: int
    """True vocabulary columns of this rank."""
    temperature: float
    vocabulary: int
    """True size of the whole vocabulary."""
    filter: Filter
    tp_group: dist.ProcessGroup | None
    entropy: EntropyMode
    filter_entropy: bool = False
    """Whether the entropy of the filtered distribution is asked for."""

    @property
    def with_entropy(self) -> bool:
        return self.entropy != "none"

    def shard_proxy(self, proxy: ProxyStore | None) -> ShardProxy | None:
        return None if proxy is None else proxy.shard(self.first, self.columns)


def resolve(
    local: int,
    targets: Tensor,
    temperature: float,
    keeps: Filter,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    entropy: EntropyMode,
    filter_entropy: bool = False,
) -> tuple[Settings, Tensor]:
    """Returns checked settings for `local` columns on this rank, and `targets` [T] as columns of this rank's slice."""
    check_settings(temperature, keeps.min_p, keeps.fixed_tau, keeps.top_k, keeps.top_p, entropy)
    ranks, rank = ranks_of(tp_group), 0 if tp_group is None else dist.get_rank(tp_group)
    vocab_size = local * ranks if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= local * ranks:
        raise ValueError(f"vocab_size is {vocab_size}, but the logits hold {local} columns on each of {ranks} ranks")
    check_targets(targets, vocab_size)
    settings = Settings(
        first=rank * local,
        columns=min(max(vocab_size - rank * local, 0), local),
        temperature=float(temperature),
        vocabulary=vocab_size,
        filter=keeps,
        tp_group=tp_group,
        entropy=entropy,
        filter_entropy=filter_entropy,
    )
    return settings, targets - rank * local


def ranks_of(tp_group: dist.ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


@dataclass(frozen=True, slots=True, eq=False)
class Totals:
    """The results of one read of the rows, combined over ranks; all [T]."""

    scale: RowScale
    target: Tensor
    """x of the sampled token."""


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """Everything that the caller or the backward needs of each row; all [T]."""

    log_probs: Tensor
    entropy: Tensor
    log_z: Tensor
    in_filter: Tensor
    max_logit: Tensor
    log_total: Tensor
    threshold: Tensor
    proxy_kl: Tensor
    """0 where no proxy is stored."""
    filter_entropy: Tensor
    """0 where it is not asked for."""
    filter_extent: Tensor
    """0 where filter_entropy is not asked for."""

    @property
    def scale(self) -> RowScale:
        return RowScale(self.max_logit, self.log_total, self.threshold, self.entropy)

    @classmethod
    def join(cls, parts: Sequence[RowStatistics]) -> RowStatistics:
        """Returns the statistics of consecutive chunks of rows as one."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def statistics(
    shard: Shard, log_z_rows: Tensor | None, settings: Settings, proxy: ShardProxy | None = None
) -> RowStatistics:
    """Returns the statistics of the rows of `shard`, by two small collectives. Check them with `check_finite`."""
    totals = combine(summarise(shard, settings.with_entropy, settings.filter.likeliest), settings)
    rows = None if log_z_rows is None else log_z_rows.nonzero().squeeze(1)
    masses = filter_masses(shard, rows, totals.scale, settings.filter_entropy)
    if proxy is None:
        return finish(totals, masses, rows, settings)
    return finish(totals, masses, rows, settings, proxy.stored, proxy.divergence(shard, totals.scale))


def combine(pack: Tensor, settings: Settings) -> Totals:
    """Returns totals over all ranks from this rank's result of `summarise` [4 + L, T], by one collective."""
    packs = _gather(pack, settings.tp_group)
    high, total, weighted, target = packs[:, :4].unbind(1)
    max_logit = high.amax(0)
    shift = torch.where(high == -torch.inf, 0.0, high - max_logit)
    scale = shift.exp()
    total_all = (total * scale).sum(0)
    weighted_all = ((weighted + shift * total) * scale).sum(0)
    log_total = total_all.log()
    likeliest = packs[:, 4:].flatten(0, 1).topk(settings.filter.likeliest, 0).values
    threshold = settings.filter.threshold(max_logit, log_total, likeliest)
    return Totals(RowScale(max_logit, log_total, threshold, log_total - weighted_all / total_all), target.amax(0))


def finish(
    totals: Totals,
    masses: Tensor,
    rows: Tensor | None,
    settings: Settings,
    stored: Tensor | None = None,
    divergence: Tensor | None = None,
) -> RowStatistics:
    """Returns the statistics with log Z from this rank's result of `filter_masses` [2 or 4, R], for the given rows or
    (None) all rows; and with KL(q || p) from this rank's part of it [T], in the `stored` rows ([T] bool), if given. One
    collective."""
    local = masses.flatten() if divergence is None else torch.cat([masses.flatten(), divergence])
    whole = _gather(local, settings.tp_group).sum(0)
    inside, outside, *of_entropy = whole[: masses.numel()].view_as(masses)
    scale, zeros = totals.scale, torch.zeros_like(totals.target)
    proxy_kl = zeros.clone() if stored is None else torch.where(stored, whole[masses.numel() :], 0.0)
    # On a peaked row the mass inside rounds to 1 and its log keeps no digits; the mass outside keeps them all.
    log_z = torch.where(outside < 0.5, torch.log1p(-outside), inside.log())
    filter_entropy = filter_extent = torch.zeros_like(log_z)
    if of_entropy:
        weighted, size = of_entropy
        filter_extent = size.clamp_min(1.0).log() / math.log(max(settings.vocabulary, 2))
        # H(q) = -sum q log q = log Z - sum p log p / Z; at least 0, where rounding may say otherwise.
        filter_entropy = torch.where(inside > 0, (log_z - weighted / inside).clamp_min(0.0), 0.0)
    if rows is not None:
        log_z, filter_entropy, filter_extent = (
            zeros.index_copy(0, rows, values) for values in (log_z, filter_entropy, filter_extent)
        )
    return RowStatistics(
        log_probs=(totals.target - scale.max_logit) - scale.log_total,
        entropy=scale.entropy,
        log_z=log_z,
        in_filter=totals.target >= scale.threshold,
        max_logit=scale.max_logit,
        log_total=scale.log_total,
        threshold=scale.threshold,
        proxy_kl=proxy_kl,
        filter_entropy=filter_entropy,
        filter_extent=filter_extent,
    )


def _gather(local: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Returns the values of all ranks: [...] -> [ranks, ...]."""
    if tp_group is None or local.numel() == 0:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(ranks_of(tp_group))]
    dist.all_gather(parts, local, group=tp_group)
    return torch.stack(parts)


def check_finite(stats: RowStatistics, first: int = 0) -> None:
    """Raises ValueError for rows that are not finite; `first` is the number of the first row. Called after the gather,
    so that every rank raises and no rank waits for the others."""
    bad = ~torch.isfinite(stats.max_logit + stats.log_total)

    def message() -> str:
        rows: Sequence[int] = (bad.nonzero().squeeze(1)[:5] + first).tolist()
        return f"logits of {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf, or only -inf; first rows: {rows}"

    refuse(bad.any(), message)
