"""The factors of a row's gradient, from the gradients of its statistics.

Legend: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpreg.statistics.proxy_store import ShardProxy
from lpreg.statistics.shard import Rows


@dataclass(frozen=True, slots=True, eq=False)
class RowGradients:
    """The factors of d loss / d x = p * (coefficient - entropy * (log p + H)) + target * onehot - proxy * q; all
    [T]."""

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

    @property
    def active(self) -> Tensor:
        """[T] bool, whether the row has a gradient."""
        active = (self.target != 0) | (self.dropped != 0)
        if self.entropy is not None:
            active |= self.entropy != 0
        return active if self.filtered is None else active | self.filtered

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
        )


def row_gradients(
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_z: Tensor | None,
    log_z: Tensor,
    log_z_rows: Tensor | None,
    temperature: float,
    grad_proxy_kl: Tensor | None = None,
    proxy: ShardProxy | None = None,
) -> RowGradients:
    """Returns the factors for the raw logits from the gradients of the statistics; all [T]."""
    target = torch.zeros_like(log_z) if grad_log_probs is None else grad_log_probs / temperature
    kept = dropped = -target
    filtered = None
    if grad_log_z is not None:
        real = log_z > -torch.inf if log_z_rows is None else log_z_rows & (log_z > -torch.inf)
        shift = torch.where(real, grad_log_z / temperature, 0.0)
        # d log Z / dx is q - p: p * (1/Z - 1) inside the filter, -p outside. expm1 keeps its digits near Z = 1.
        kept = torch.where(real, shift * torch.expm1(-log_z), 0.0) - target
        dropped = -target - shift
        filtered = shift != 0
    entropy = None if grad_entropy is None else grad_entropy / temperature
    if grad_proxy_kl is None or proxy is None:
        return RowGradients(target, kept, dropped, entropy, filtered)
    of_proxy = torch.where(proxy.stored, grad_proxy_kl / temperature, 0.0)
    return RowGradients(target, kept + of_proxy, dropped + of_proxy, entropy, filtered, of_proxy, proxy)
