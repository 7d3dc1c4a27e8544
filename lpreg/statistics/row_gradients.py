"""The factors of a row's gradient, from the gradients of its statistics.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from lpreg.statistics.proxy_store import ShardProxy
from lpreg.statistics.shard import Rows


@dataclass(frozen=True, slots=True, eq=False)
class RowGradients:
    """The factors of d loss / d x = p * (coefficient - entropy * (log p + H)) + target * onehot - proxy * q; all [T].
    Inside the filter, filter_entropy * (log p + filter_offset) is subtracted from the coefficient."""

    target: Tensor
    kept: Tensor
    """Coefficient of the columns inside the filter."""
    dropped: Tensor
    """Coefficient of the columns outside it."""
    entropy: Tensor | None
    filtered: Tensor | None
    """bool, the rows where `kept` and `dropped` differ; None if there is no such row."""
    proxy: Tensor | None = None
    """Factor of q of the stored proxy, which is subtracted; `kept` and `dropped` include its share of p. None: no row
    has a stored proxy."""
    stored: ShardProxy | None = None
    """The stored proxy; given together with `proxy`."""
    filter_entropy: Tensor | None = None
    """Factor of the gradient of the filtered distribution's entropy, over Z. None: no row has this gradient."""
    filter_offset: Tensor | None = None
    """That entropy less log Z; given together with `filter_entropy`."""

    @property
    def active(self) -> Tensor:
        """[T] bool, whether the row has a gradient."""
        active = (self.target != 0) | (self.dropped != 0)
        if self.entropy is not None:
            active |= self.entropy != 0
        return active if self.filtered is None else active | self.filtered

    @property
    def beyond_kernels(self) -> Tensor:
        """[T] bool, rows whose gradient the kernels do not write: those with the filtered distribution's entropy."""
        return (
            torch.zeros_like(self.target, dtype=torch.bool) if self.filter_entropy is None else self.filter_entropy != 0
        )

    def of(self, rows: Rows) -> RowGradients:
        """Returns the factors of the given rows."""
        return RowGradients(
            self.target[rows],
            self.kept[rows],
            self.dropped[rows],
            None if self.entropy is None else self.entropy[rows],
            None if self.filtered is None else self.filtered[rows],
            None if self.proxy is None else self.proxy[rows],
            None if self.stored is None else self.stored.take(rows),
            None if self.filter_entropy is None else self.filter_entropy[rows],
            None if self.filter_offset is None else self.filter_offset[rows],
        )


class StatisticGradients(TypedDict, total=False):
    """The gradients of the statistics that have one, by name; absent or None: no gradient."""

    log_probs: Tensor | None
    entropy: Tensor | None
    log_z: Tensor | None
    proxy_kl: Tensor | None
    filter_entropy: Tensor | None


def row_gradients(
    of: StatisticGradients,
    log_z: Tensor,
    filter_entropy: Tensor,
    log_z_rows: Tensor | None,
    temperature: float,
    proxy: ShardProxy | None = None,
) -> RowGradients:
    """Returns the factors for the raw logits from the gradients of the statistics; all [T]."""
    grad_log_probs, grad_log_z, grad_proxy_kl = of.get("log_probs"), of.get("log_z"), of.get("proxy_kl")
    grad_entropy, grad_filter_entropy = of.get("entropy"), of.get("filter_entropy")
    target = torch.zeros_like(log_z) if grad_log_probs is None else grad_log_probs / temperature
    kept = dropped = -target
    filtered = factor = offset = None
    real = log_z > -torch.inf if log_z_rows is None else log_z_rows & (log_z > -torch.inf)
    if grad_log_z is not None:
        shift = torch.where(real, grad_log_z / temperature, 0.0)
        # d log Z / dx is q - p: p * (1/Z - 1) inside the filter, -p outside. expm1 keeps its digits near Z = 1.
        kept = torch.where(real, shift * torch.expm1(-log_z), 0.0) - target
        dropped = -target - shift
        filtered = shift != 0
    if grad_filter_entropy is not None:
        # d H / dx is -q (log q + H) inside the filter, with log q = log p - log Z.
        factor = torch.where(real, grad_filter_entropy / temperature * torch.exp(-log_z), 0.0)
        offset = torch.where(real, filter_entropy - log_z, 0.0)
        filtered = factor != 0 if filtered is None else filtered | (factor != 0)
    entropy = None if grad_entropy is None else grad_entropy / temperature
    if grad_proxy_kl is None or proxy is None:
        return RowGradients(target, kept, dropped, entropy, filtered, None, None, factor, offset)
    of_proxy = torch.where(proxy.stored, grad_proxy_kl / temperature, 0.0)
    kept, dropped = kept + of_proxy, dropped + of_proxy
    return RowGradients(target, kept, dropped, entropy, filtered, of_proxy, proxy, factor, offset)
