"""Passes over rows of logits. Each program of a kernel owns one row and reads it in blocks of columns.

Plainly written kernels are bound by instructions, not by memory (17 to 20 per element in bf16 on sm_90). Hence they use
exponentials in base 2, which the hardware has, a main loop without a mask, and blocks of which every thread reads 16
bytes at once.

Legend: T rows, C true vocabulary columns of this rank (its padding excluded), x = logit / temperature in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lpreg.statistics.row_gradients import RowGradients
from lpreg.statistics.shard import RowScale, Shard

BLOCK = 8192
WARPS = 8
"""256 threads of 32 elements: four 16-byte loads each in bf16, and few reductions over threads per row."""

ZERO, WRITE, LEAVE = tl.constexpr(0), tl.constexpr(1), 2
"""What a kernel does with a row of the gradient."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e4)
"""2 ** _FLOOR is 0, and unlike -inf _FLOOR may be multiplied by 0 (entropy terms of impossible tokens)."""


@triton.jit
def _scaled(logits, cooling, SCALE: tl.constexpr):
    """cooling: 1 / temperature. Every kernel uses the same arithmetic, so that the filter does not depend on the
    kernel."""
    x = logits.to(tl.float32)
    if SCALE:
        x = x * cooling
    return x


@triton.jit
def _fold(x, high, total, weighted):
    """Adds a block to the running (max x, sum e, sum e * (x - max) in base 2); e = exp(x - max)."""
    higher = tl.maximum(high, tl.max(x, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shift = tl.where(high == float("-inf"), 0.0, (high - base) * _LOG2_E)
    scale = tl.exp2(shift)
    # Subtracted before it is scaled, so that the largest x is at 0 exactly: peaked rows need every digit of log p.
    distance = (x - base) * _LOG2_E
    e = tl.exp2(distance)
    weighted = (weighted + shift * total) * scale + tl.sum(e * tl.maximum(distance, _FLOOR), 0)
    return higher, total * scale + tl.sum(e, 0), weighted


@triton.jit
def _summarise(
    logits, stride, targets, out, rows, columns, cooling, SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    high, total, weighted = float("-inf"), 0.0, 0.0
    whole = (columns // BLOCK) * BLOCK
    for start in range(0, whole, BLOCK):
        x = _scaled(tl.load(logits + start + tl.arange(0, BLOCK)), cooling, SCALE)
        high, total, weighted = _fold(x, high, total, weighted)
    if whole < columns:
        column = whole + tl.arange(0, BLOCK)
        x = _scaled(tl.load(logits + column, mask=column < columns, other=float("-inf")), cooling, SCALE)
        high, total, weighted = _fold(x, high, total, weighted)
    target = tl.load(targets + row)
    x = _scaled(tl.load(logits + tl.maximum(target, 0)), cooling, SCALE)
    tl.store(out + row, high)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, weighted * _LN_2)
    tl.store(out + 3 * rows + row, tl.where(target >= 0, x, float("-inf")))


@triton.jit
def _masses(x, threshold, high, log2_total):
    """Probability inside and outside the filter. Outside is summed separately: 1 - inside would keep no digits."""
    p = tl.exp2((x - high) * _LOG2_E - log2_total)
    inside = tl.where(x >= threshold, p, 0.0)
    return tl.sum(inside, 0), tl.sum(p - inside, 0)


@triton.jit
def _filter_masses(
    logits, stride, chosen, thresholds, highs, log_totals, out, count, columns, cooling,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(chosen + place)
    logits += row * stride
    threshold, high = tl.load(thresholds + row), tl.load(highs + row)
    log2_total = tl.load(log_totals + row) * _LOG2_E
    inside, outside = 0.0, 0.0
    whole = (columns // BLOCK) * BLOCK
    for start in range(0, whole, BLOCK):
        x = _scaled(tl.load(logits + start + tl.arange(0, BLOCK)), cooling, SCALE)
        more_inside, more_outside = _masses(x, threshold, high, log2_total)
        inside, outside = inside + more_inside, outside + more_outside
    if whole < columns:
        column = whole + tl.arange(0, BLOCK)
        x = _scaled(tl.load(logits + column, mask=column < columns, other=float("-inf")), cooling, SCALE)
        more_inside, more_outside = _masses(x, threshold, high, log2_total)
        inside, outside = inside + more_inside, outside + more_outside
    tl.store(out + place, inside)
    tl.store(out + count + place, outside)


@triton.jit
def _gradient_of(x, threshold, high, log2_total, kept, dropped, entropy_factor, entropy, ENTROPY: tl.constexpr):
    # In base 2. The largest x is subtracted first: one subtraction of log sum e would lose the digits of large logits.
    log2_p = (x - high) * _LOG2_E - log2_total
    factor = tl.where(x >= threshold, kept, dropped)
    if ENTROPY:
        factor -= entropy_factor * (tl.maximum(log2_p, _FLOOR) * _LN_2 + entropy)
    return tl.exp2(log2_p) * factor


@triton.jit
def _write_gradient(
    logits, stride, out, out_stride, targets, thresholds, highs, log_totals, tasks, kepts, droppeds, onehots,
    entropy_factors, entropies, columns, cooling,
    SCALE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    out += row * out_stride
    whole = (columns // BLOCK) * BLOCK
    task = tl.load(tasks + row)
    if task == ZERO:  # the logits are not read
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(out + column, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < columns)
    if task == WRITE:
        threshold, high = tl.load(thresholds + row), tl.load(highs + row)
        log2_total = tl.load(log_totals + row) * _LOG2_E
        kept, dropped = tl.load(kepts + row), tl.load(droppeds + row)
        entropy_factor, entropy = 0.0, 0.0
        if ENTROPY:
            entropy_factor, entropy = tl.load(entropy_factors + row), tl.load(entropies + row)
        # The column of the sampled token is written again at the end, so that no other column must be compared with it.
        target = tl.load(targets + row)
        sampled = _scaled(tl.load(logits + tl.maximum(target, 0)), cooling, SCALE)
        of_target = tl.load(onehots + row) + _gradient_of(
            sampled, threshold, high, log2_total, kept, dropped, entropy_factor, entropy, ENTROPY
        )
        tl.debug_barrier()  # `out` may be the logits: the column is read before it is written
        for start in range(0, whole, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = _scaled(tl.load(logits + column), cooling, SCALE)
            gradient = _gradient_of(x, threshold, high, log2_total, kept, dropped, entropy_factor, entropy, ENTROPY)
            tl.store(out + column, gradient.to(out.dtype.element_ty))
        if whole < columns:
            column = whole + tl.arange(0, BLOCK)
            x = _scaled(tl.load(logits + column, mask=column < columns, other=float("-inf")), cooling, SCALE)
            gradient = _gradient_of(x, threshold, high, log2_total, kept, dropped, entropy_factor, entropy, ENTROPY)
            tl.store(out + column, gradient.to(out.dtype.element_ty), mask=column < columns)
        tl.debug_barrier()
        tl.store(out + target, of_target.to(out.dtype.element_ty), mask=target >= 0)


def summarise(shard: Shard) -> Tensor:
    """Returns [4, T] in one read: max x, sum e, sum e * (x - max), x of the target; e = exp(x - max)."""
    tokens = shard.logits.shape[0]
    pack = torch.empty(4, tokens, dtype=torch.float32, device=shard.logits.device)
    _summarise[(tokens,)](
        shard.logits,
        shard.logits.stride(0),
        _own_targets(shard),
        pack,
        tokens,
        shard.columns,
        **_common(shard),
    )
    return pack


def filter_masses(shard: Shard, rows: Tensor | None, scale: RowScale) -> Tensor:
    """Returns [2, R] in one read of `rows` or (None) all rows: this shard's probability inside and outside the
    filter."""
    if rows is None:
        rows = torch.arange(shard.logits.shape[0], device=shard.logits.device)
    masses = torch.empty(2, rows.shape[0], dtype=torch.float32, device=shard.logits.device)
    _filter_masses[(rows.shape[0],)](
        shard.logits,
        shard.logits.stride(0),
        rows,
        scale.threshold,
        scale.max_logit,
        scale.log_total,
        masses,
        rows.shape[0],
        shard.columns,
        **_common(shard),
    )
    return masses


def write_gradient(
    out: Tensor,
    shard: Shard,
    grads: RowGradients,
    scale: RowScale,
    leave: Tensor,
) -> None:
    """Fills the true columns of `out` [T, V/TP], which may be the logits, with d loss / d x; 0 for rows without
    gradient.

    leave: [T] bool, rows that are not written. The terms of a stored proxy and of the filtered distribution's entropy
    are not included.
    """
    with_entropy = grads.entropy is not None
    tasks = torch.where(leave, LEAVE, grads.active.to(torch.int8))
    nothing = scale.log_total  # a pointer that is never read
    _write_gradient[(out.shape[0],)](
        shard.logits,
        shard.logits.stride(0),
        out,
        out.stride(0),
        _own_targets(shard),
        scale.threshold,
        scale.max_logit,
        scale.log_total,
        tasks,
        grads.kept,
        grads.dropped,
        grads.target,
        grads.entropy if with_entropy else nothing,
        scale.entropy if with_entropy else nothing,
        shard.columns,
        ENTROPY=with_entropy,
        **_common(shard),
    )


def _own_targets(shard: Shard) -> Tensor:
    """[T], columns of the sampled tokens; -1 if another rank owns the token."""
    return torch.where(shard.owned, shard.targets, -1)


def _common(shard: Shard) -> dict[str, Any]:
    return {
        "cooling": 1.0 / shard.temperature,
        "SCALE": shard.temperature != 1.0,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
