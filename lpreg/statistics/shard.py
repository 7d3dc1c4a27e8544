"""One rank's slice of the logits, read a chunk of rows at a time.

Legend: T tokens, C this rank's true vocabulary columns (its padding excluded), R a subset of the rows. Every pass reads
x = logits / temperature in fp32 (fp64 for fp64 logits) into a work buffer that is small enough to stay in cache, so the
logits are never copied as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one work buffer: on a CPU it should fit into a core's cache, on a GPU outweigh the kernel launches.
CPU_WORK_ELEMENTS = 2**18
GPU_WORK_ELEMENTS = 2**25

Rows = slice | Tensor


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a GPU, for which the host should not wait.

    Triton's interpreter, which tests switch on by TRITON_INTERPRET=1, makes a GPU of the CPU.
    """
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One rank's slice of the vocabulary and how to scale it."""

    logits: Tensor
    """[T, V/TP], raw logits."""
    targets: Tensor
    """[T] int64, column of the sampled token in this shard; outside [0, columns) if another rank owns the token."""
    columns: int
    """C: the leading columns, which are true vocabulary; the rest is padding and is never read."""
    temperature: float

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic and of the statistics."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def owned(self) -> Tensor:
        """[T] bool, whether the sampled token is one of this rank's columns."""
        return (self.targets >= 0) & (self.targets < self.columns)

    @property
    def target_columns(self) -> Tensor:
        """[T], like `targets`, but always a column that exists; meaningless if the token is not owned."""
        return self.targets.clamp(0, self.columns - 1)

    def chunk_rows(self) -> int:
        """Number of rows that one work buffer holds."""
        budget = CPU_WORK_ELEMENTS if self.logits.device.type == "cpu" else GPU_WORK_ELEMENTS
        return max(1, min(self.logits.shape[0], budget // max(1, self.logits.shape[1])))

    def chunks(self, rows: Tensor | None) -> Iterator[tuple[slice, Rows]]:
        """Yields `rows`, or (None) all rows, in chunks that fit a work buffer, see `row_chunks`."""
        return row_chunks(self.logits.shape[0], self.chunk_rows(), rows)

    def buffer(self) -> Tensor:
        """Returns a new work buffer."""
        return torch.empty(self.chunk_rows(), self.logits.shape[1], dtype=self.dtype, device=self.logits.device)

    def read(self, rows: Rows, buffer: Tensor) -> Tensor:
        """Returns x of `rows` as a view of `buffer`, [R, C]."""
        if isinstance(rows, slice):
            source = self.logits[rows]
            x = buffer[: source.shape[0], : self.columns].copy_(source[:, : self.columns])
        else:
            x = buffer[: rows.shape[0]]
            if x.dtype == self.logits.dtype:
                torch.index_select(self.logits, 0, rows, out=x)
            else:
                x.copy_(self.logits.index_select(0, rows))
            x = x[:, : self.columns]
        return x if self.temperature == 1.0 else x.div_(self.temperature)


@dataclass(frozen=True, slots=True, eq=False)
class RowScale:
    """What turns x into log-probs and filter membership, over the whole vocabulary; all [T].

    log sum exp(x) is kept in two parts: if all logits share a large offset, their sum has no digits left for log p.
    """

    max_logit: Tensor
    log_total: Tensor
    """log sum exp(x - max)."""
    threshold: Tensor
    """The filter keeps x >= threshold."""
    entropy: Tensor

    def of(self, rows: Rows) -> RowScale:
        """Returns the values of the given rows."""
        return RowScale(self.max_logit[rows], self.log_total[rows], self.threshold[rows], self.entropy[rows])

    def log_p_(self, x: Tensor, rows: Rows) -> Tensor:
        """Overwrites x [R, C] of the given rows with log p, and returns it."""
        return x.sub_(self.max_logit[rows, None]).sub_(self.log_total[rows, None])


def row_chunks(tokens: int, size: int, rows: Tensor | None) -> Iterator[tuple[slice, Rows]]:
    """Yields (place in the list of rows, rows to read); None means all rows, read without an index."""
    count = tokens if rows is None else rows.shape[0]
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        yield place, place if rows is None else rows[place]
