"""The passes over one rank's rows of logits behind `token_stats` and its fused forms.

Legend: T tokens, C this rank's true vocabulary columns (its padding excluded), R a subset of the rows;
x = logits / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpreg.statistics import kernels
from lpreg.statistics.row_gradients import RowGradients
from lpreg.statistics.shard import Rows, RowScale, Shard

# exp(LOG_FLOOR) is 0 in fp64 too, and unlike -inf LOG_FLOOR may be multiplied by 0 (entropy of impossible tokens).
LOG_FLOOR = -1e4


def summarise(shard: Shard, with_entropy: bool, likeliest: int = 0) -> Tensor:
    """Reads every row once and returns [4 + likeliest, T]: max x, sum e, sum e * (x - max), x of the target, and the
    largest x in falling order; e = exp(x - max).

    A shard without columns, or a row that is all -inf, gives (-inf, 0, 0, -inf), which adds nothing when ranks combine.
    Where there are fewer columns than `likeliest`, the rest is -inf.
    """
    tokens = shard.logits.shape[0]
    pack = torch.full((4 + likeliest, tokens), -torch.inf, dtype=shard.dtype, device=shard.logits.device)
    pack[1:3] = 0.0
    if shard.columns == 0 or tokens == 0:
        return pack
    if kernels.usable(shard.logits) and not likeliest:
        return kernels.load().summarise(shard)
    ranked = min(likeliest, shard.columns)
    shifted_buffer, exp_buffer = shard.buffer(), shard.buffer()
    for place, rows in shard.chunks(None):
        x = shard.read(rows, shifted_buffer)
        high = x.amax(-1)
        if ranked:
            pack[4 : 4 + ranked, place] = x.topk(ranked, -1).values.t()
        x.sub_(torch.where(high == -torch.inf, 0.0, high)[:, None])
        if with_entropy:
            x.clamp_min_(LOG_FLOOR)
        e = torch.exp(x, out=exp_buffer[: x.shape[0], : shard.columns])
        pack[0, place], pack[1, place] = high, e.sum(-1)
        if with_entropy:
            pack[2, place] = x.mul_(e).sum(-1)
    own = shard.logits.gather(1, shard.target_columns[:, None]).squeeze(1).to(shard.dtype) / shard.temperature
    pack[3] = torch.where(shard.owned, own, -torch.inf)
    return pack


def filter_masses(shard: Shard, rows: Tensor | None, scale: RowScale, with_entropy: bool = False) -> Tensor:
    """Reads `rows` a second time and returns [2, R]: this shard's probability inside and outside the filter
    x >= threshold; with_entropy [4, R]: also the sum of p log p inside, and the number of columns inside."""
    count = shard.logits.shape[0] if rows is None else rows.shape[0]
    masses = torch.zeros(4 if with_entropy else 2, count, dtype=shard.dtype, device=shard.logits.device)
    if shard.columns == 0 or count == 0:
        return masses
    if kernels.usable(shard.logits) and not with_entropy:
        return kernels.load().filter_masses(shard, rows, scale)
    buffer, inside_buffer = shard.buffer(), shard.buffer()
    for place, chunk in shard.chunks(rows):
        x = shard.read(chunk, buffer)
        # 1 inside the filter and 0 outside, as floats: much faster on a CPU than a bool mask, and as exact.
        inside = torch.ge(x, scale.threshold[chunk, None], out=inside_buffer[: x.shape[0], : shard.columns])
        log_p = scale.log_p_(x, chunk)
        if with_entropy:
            masses[3, place] = inside.sum(-1)
            floored = log_p.clamp_min(LOG_FLOOR)
            masses[2, place] = (floored.exp() * floored).mul_(inside).sum(-1)
        p = log_p.exp_()
        masses[0, place] = inside.mul_(p).sum(-1)
        masses[1, place] = p.sub_(inside).sum(-1)
    return masses


def write_gradient(out: Tensor, shard: Shard, grads: RowGradients, scale: RowScale) -> None:
    """Fills `out` [T, V/TP], which may be the logits themselves, with d loss / d x. Rows without gradient are not
    read."""
    out[:, shard.columns :] = 0.0
    if shard.columns == 0 or out.shape[0] == 0:
        return
    if kernels.usable(shard.logits) and kernels.usable(out):
        entries = _entry_gradients(shard, grads, scale)  # before the kernels write, maybe over the logits
        left = grads.beyond_kernels
        kernels.load().write_gradient(out, shard, grads, scale, leave=left)
        if grads.filter_entropy is not None:
            _write_rows(out, shard, grads, scale, left)
        if entries is not None:
            rows, columns, values = entries
            out[rows, columns] = values.to(out.dtype)
    else:
        out.index_fill_(0, (~grads.active).nonzero().squeeze(1), 0.0)
        _write_rows(out, shard, grads, scale, grads.active)


def _write_rows(out: Tensor, shard: Shard, grads: RowGradients, scale: RowScale, left: Tensor) -> None:
    """Fills the rows of `out` that `left` [T] marks, without the kernels."""
    parts = [(left, False)]
    if grads.filtered is not None:
        parts = [(left & ~grads.filtered, False), (left & grads.filtered, True)]
    buffer = shard.buffer()
    for mask, filtered in parts:
        rows = mask.nonzero().squeeze(1)
        every_row = rows.shape[0] == mask.shape[0]
        for _, chunk in shard.chunks(None if every_row else rows):
            x = _gradient_(shard.read(chunk, buffer), chunk, grads, scale, filtered)
            onehot = torch.where(shard.owned[chunk], grads.target[chunk], 0.0)
            x.scatter_add_(1, shard.target_columns[chunk, None], onehot[:, None])
            if grads.proxy is not None and grads.stored is not None:
                stored = grads.stored.take(chunk)
                of_q = grads.proxy[chunk][stored.tokens] * stored.log_q.to(x.dtype).exp()
                x.index_put_((stored.tokens, stored.columns), -of_q, accumulate=True)
            out[chunk, : shard.columns] = x.to(out.dtype)


def _gradient_(x: Tensor, rows: Rows, grads: RowGradients, scale: RowScale, filtered: bool) -> Tensor:
    """Overwrites x [R, C] of the given rows with p * (coefficient - entropy * (log p + H)), and returns it. filtered:
    whether the coefficient inside the filter differs."""
    coefficient = grads.dropped[rows, None]
    inside = x >= scale.threshold[rows, None] if filtered else None
    scale.log_p_(x, rows)
    if inside is not None:
        kept = grads.kept[rows, None]
        if grads.filter_entropy is not None and grads.filter_offset is not None:
            log_q_and_entropy = x.clamp_min(LOG_FLOOR).add_(grads.filter_offset[rows, None])
            kept = kept - grads.filter_entropy[rows, None] * log_q_and_entropy
        coefficient = torch.where(inside, kept, coefficient)
    if grads.entropy is not None:
        log_p = x.clamp_min(LOG_FLOOR)
        coefficient = coefficient - grads.entropy[rows, None] * log_p.add_(scale.entropy[rows, None])
    return x.exp_().mul_(coefficient)


def _entry_gradients(shard: Shard, grads: RowGradients, scale: RowScale) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns (row, column, d loss / d x) at the entries of a stored proxy, or None without one: p - q, rounded once.

    Entries without q become copies of the first one that has some, so that no place gets two different values.
    """
    stored = grads.stored
    if grads.proxy is None or stored is None or stored.tokens.shape[0] == 0:
        return None
    own = stored.log_q > -torch.inf
    first = own.int().argmax()[None]
    rows, columns, log_q = (torch.where(own, v, v[first]) for v in (stored.tokens, stored.columns, stored.log_q))
    x = shard.logits[rows, columns].to(shard.dtype)[:, None] / shard.temperature
    values = _gradient_(x, rows, grads, scale, grads.filtered is not None)[:, 0]
    onehot = torch.where(shard.targets[rows] == columns, grads.target[rows], 0.0)
    return rows, columns, values + onehot - grads.proxy[rows] * log_q.to(shard.dtype).exp()
