"""The LM head, one chunk of tokens at a time: logits from hidden states and gradients of hidden states and weight,
without a [T, V] tensor.

Logits are fp32 (fp64 for fp64 input) whatever the dtype of hidden and weight: the rounding of a bf16 logit moves
log-probs by some hundredths of a nat and tokens across the filter's edge, and in chunks fp32 costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lpreg.statistics import kernels
from lpreg.statistics.row_gradients import RowGradients
from lpreg.statistics.row_statistics import Settings, ranks_of
from lpreg.statistics.rows import write_gradient
from lpreg.statistics.shard import Rows, Shard, row_chunks

# Tokens of one chunk: enough for matrix products at full rate, few enough for a small logits buffer.
CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048

# On CUDA, mm gives fp32 from narrower factors since torch 2.8, and addmm adds them to an fp32 sum since 2.10. Before
# that, products of SUM_ROWS rows of the weight are added one by one.
ADDMM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
SUM_ROWS = 8192


class Head:
    """hidden [T, d] and this rank's weight [V/TP, d], of which C rows are true vocabulary and the rest is never
    read."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings, chunk_tokens: int | None
    ) -> None:
        """targets: [T], as columns of this rank."""
        self.hidden, self.targets, self.settings = hidden, targets, settings
        self.weight = weight[: settings.columns]
        default = CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else GPU_CHUNK_TOKENS
        self.chunk_tokens = max(1, min(chunk_tokens or default, hidden.shape[0]))
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self._buffer = torch.empty(self.chunk_tokens, settings.columns, dtype=dtype, device=hidden.device)

    def chunks(self, rows: Tensor | None = None) -> Iterator[tuple[slice, Rows]]:
        """Yields chunks of `rows` or (None) all rows; one empty chunk if there is no row, so that there is one to
        join."""
        if (self.hidden if rows is None else rows).shape[0] == 0:
            yield slice(0, 0), slice(0, 0)
        yield from row_chunks(self.hidden.shape[0], self.chunk_tokens, rows)

    def project(self, rows: Rows) -> Shard:
        """Returns the logits [R, C] of up to chunk_tokens rows, which are valid until the next call."""
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
    """Sums of the gradients of a head's inputs over its chunks."""

    def __init__(self, head: Head, hidden: bool, weight_rows: int, weight_grad: Tensor | None = None) -> None:
        """hidden: whether its gradient is needed; weight_rows: V/TP, or 0 if no gradient of the weight is needed;
        weight_grad: the tensor that the gradient of the weight is added to (None: zeros)."""
        self._head = head
        self.hidden = torch.zeros_like(head.hidden) if hidden else None
        """[T, d], the part of this rank's columns; 0 for tokens that were never added."""
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

    def rows(self, active: Tensor) -> Tensor | None:
        """Returns the rows to add, given which rows have a gradient [R]; None means all, of which some may have none.

        With the kernels of GPUs it is always all: products of zeros take less time than waiting for the number of rows.
        """
        if kernels.usable(self._head._buffer) or bool(active.all()):
            return None
        return active.nonzero().squeeze(1)

    def add(
        self, rows: Rows, shard: Shard, grads: RowGradients, threshold: Tensor, log_sum: Tensor, entropy: Tensor
    ) -> None:
        """Adds the gradients of the rows whose logits `shard` holds; the logits are overwritten. The other arguments
        are [R]."""
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
    """Adds left [C, R] @ right [R, d] to total [C, d], summed in total's dtype whatever the dtype of the factors."""
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
    """Returns a shard of the given rows (ascending), moved to the front of the logits' own memory."""
    for place, part in shard.chunks(rows):
        shard.logits[place] = shard.logits[part]  # rows move up or stay, so no row is overwritten before it is read
    return replace(shard, logits=shard.logits[: rows.shape[0]], targets=shard.targets[rows])


def gather_sequence(part: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Returns the parts of all ranks as one, [T/TP, d] -> [T, d]."""
    ranks = ranks_of(tp_group)
    if ranks == 1 or part.numel() == 0:
        return part
    whole = part.new_empty(ranks * part.shape[0], part.shape[1])
    dist.all_gather(list(whole.chunk(ranks)), part.contiguous(), group=tp_group)
    return whole


def sum_over_ranks(d_hidden: Tensor, sequence_parallel: bool, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Returns the sum of d hidden [T, d] over ranks: this rank's part [T/TP, d] under sequence parallelism, otherwise
    [T, d]."""
    ranks = ranks_of(tp_group)
    if ranks == 1 or d_hidden.numel() == 0:
        return d_hidden
    if not sequence_parallel:
        dist.all_reduce(d_hidden, group=tp_group)
        return d_hidden
    part = d_hidden.new_empty(d_hidden.shape[0] // ranks, d_hidden.shape[1])
    dist.reduce_scatter(part, list(d_hidden.chunk(ranks)), group=tp_group)
    return part
