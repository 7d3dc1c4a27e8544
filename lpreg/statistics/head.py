"""The LM head a chunk of tokens at a time: logits out of hidden states, gradients of both back, no [T, V] anywhere.

Logits are fp32 (fp64 for fp64 input) whatever the dtype of hidden and weight: a bf16 logit is off by enough to move
log-probs by some hundredths of a nat and tokens over the filter's edge, and in chunks fp32 costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg.statistics.row_gradients import RowGradients
from lpreg.statistics.row_statistics import Settings, ranks_of
from lpreg.statistics.rows import write_gradient
from lpreg.statistics.shard import Rows, Shard, row_chunks

# Tokens of one chunk. Enough for the matrix products to run at full rate; the logits' buffer stays small.
CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048

# On CUDA, mm gives fp32 from narrower factors since torch 2.8, addmm takes an fp32 sum beside them since 2.10; before,
# products of so many rows of the weight are added one by one.
ADDMM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
SUM_ROWS = 8192


class Head:
    """hidden [T, d] and this rank's weight [V/TP, d]; C of its rows are true vocabulary, the rest is never read."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings, chunk_tokens: int | None
    ) -> None:
        """targets: [T], columns of this rank."""
        self.hidden, self.targets, self.settings = hidden, targets, settings
        self.weight = weight[: settings.columns]
        default = CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else GPU_CHUNK_TOKENS
        self.chunk_tokens = max(1, min(chunk_tokens or default, hidden.shape[0]))
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self._buffer = torch.empty(self.chunk_tokens, settings.columns, dtype=dtype, device=hidden.device)

    def chunks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Rows]]:
        """Of `rows` or (None) all; one empty chunk where there is no row, so that there is something to join."""
        if (self.hidden if rows is None else rows).shape[0] == 0:
            yield slice(0, 0), slice(0, 0)
        yield from row_chunks(self.hidden.shape[0], self.chunk_tokens, rows)

    def project(self, rows: Rows) -> Shard:
        """Logits [R, C] of up to chunk_tokens rows. They live until the next call."""
        hidden = self.hidden[rows]
        logits = self._buffer[: hidden.shape[0]]
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, self.weight.t(), out=logits)
        elif logits.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=logits.dtype, out=logits)
        else:
            torch.mm(hidden.to(logits.dtype), self.weight.t().to(logits.dtype), out=logits)
        return Shard(logits, self.targets[rows], self.settings.columns, self.settings.temperature)


class HeadGradient:
    """Sums the gradients of a head's inputs over its chunks."""

    def __init__(self, head: Head, hidden: bool, weight_rows: int, weight_grad: Tensor | None = None) -> None:
        """hidden: is its gradient wanted; weight_rows: V/TP, or 0 where no gradient of the weight is wanted;
        weight_grad: what that of the weight is added to (None: zeros)."""
        self._head = head
        self.hidden = torch.zeros_like(head.hidden) if hidden else None
        """[T, d], of this rank's columns only; 0 for tokens never added."""
        self.weight: Tensor | None = None
        """[V/TP, d], fp32 (fp64 for fp64 input)."""
        buffer = head._buffer
        if weight_rows and weight_grad is not None:
            self.weight = weight_grad
        elif weight_rows:
            self.weight = torch.zeros(weight_rows, head.hidden.shape[1], dtype=buffer.dtype, device=buffer.device)
        self._buffer = (
            buffer if buffer.dtype == head.hidden.dtype else torch.empty_like(buffer, dtype=head.hidden.dtype)
        )

    def add(
        self, rows: Rows, shard: Shard, grads: RowGradients, threshold: Tensor, log_sum: Tensor, entropy: Tensor
    ) -> None:
        """Of the rows that `shard` holds the logits of, which are overwritten; the other arguments are [R]."""
        head = self._head
        d_logits = self._buffer[: shard.logits.shape[0]]
        write_gradient(d_logits, shard, grads, threshold, log_sum, entropy)
        if self.hidden is not None:
            if isinstance(rows, slice):
                torch.mm(d_logits, head.weight, out=self.hidden[rows])
            else:
                self.hidden.index_copy_(0, rows, torch.mm(d_logits, head.weight))
        if self.weight is not None:
            _add_product(self.weight[: shard.columns], d_logits.t(), head.hidden[rows])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [C, d] += left [C, R] @ right [R, d], summed in total's dtype whatever that of the factors."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    elif ADDMM_WIDENS:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for part, rows in zip(total.split(SUM_ROWS), left.split(SUM_ROWS), strict=True):
            part.add_(torch.mm(rows, right, out_dtype=total.dtype))


def compact(shard: Shard, rows: Tensor) -> Shard:
    """Only the given rows (ascending), moved to the front of the logits' own memory."""
    for place, part in shard.chunks(rows):
        shard.logits[place] = shard.logits[part]  # a row moves up or stays, so none is overwritten before it is read
    return replace(shard, logits=shard.logits[: rows.shape[0]], targets=shard.targets[rows])


def gather_sequence(part: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[T/TP, d] of every rank -> [T, d]."""
    ranks = ranks_of(tp_group)
    if ranks == 1 or part.numel() == 0:
        return part
    whole = part.new_empty(ranks * part.shape[0], part.shape[1])
    dist.all_gather(list(whole.chunk(ranks)), part.contiguous(), group=tp_group)
    return whole


def sum_over_ranks(d_hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's columns' share of d hidden, [T, d] -> the sum: [T/TP, d] under sequence parallelism, else [T, d]."""
    ranks = ranks_of(tp_group)
    if ranks == 1 or d_hidden.numel() == 0:
        return d_hidden
    if not sequence_parallel:
        dist.all_reduce(d_hidden, group=tp_group)
        return d_hidden
    part = d_hidden.new_empty(d_hidden.shape[0] // ranks, d_hidden.shape[1])
    dist.reduce_scatter(part, list(d_hidden.chunk(ranks)), group=tp_group)
    return part
