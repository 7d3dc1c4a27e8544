"""What a loss needs from each token's logits, exactly, with the vocabulary split over tensor-parallel ranks.

The forward reads every row once, all-gathers four floats a token and combines them in rank order, so every rank holds
the same bits; rows that need log Z are read a second time and gathered once more. The backward is local and, if
asked, writes the gradient over the logits. Row arithmetic lives in `lpreg._rows`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpreg._rows import RowGradients, Shard, filter_masses, summarise, write_gradient

EntropyMode = Literal["metric", "grad", "none"]
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Statistics of T tokens at the sampling temperature, fp32 (fp64 for fp64 logits); the same bits on each rank."""

    log_probs: Tensor
    """[T], of the sampled token. Differentiable."""
    entropy: Tensor | None
    """[T], nats. Differentiable with entropy="grad"; None with entropy="none"."""
    log_z: Tensor
    """[T], log of the probability mass that the filter keeps, <= 0. 0 where log_z_rows is False, -inf where a fixed_tau
    keeps nothing; neither has a gradient. Elsewhere d(-log_z)/d logits = p - q (times 1 / temperature), which is also
    the gradient of KL(q || p) with q held fixed."""
    kept: Tensor
    """[T] bool, the sampled token passes the filter. Known for every row, whatever log_z_rows says."""
    max_logit: Tensor
    """[T], largest logit after the temperature."""

    @property
    def proxy_log_probs(self) -> Tensor:
        """[T], log q of the sampled token: log_probs - log_z where kept, else -inf. Needs the row's log_z."""
        return torch.where(self.kept, self.log_probs - self.log_z, -torch.inf)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    min_p: float = 0.02,
    fixed_tau: float | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    log_z_rows: Tensor | None = None,
    entropy: EntropyMode = "metric",
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-prob, entropy and kept filter mass of each sampled token (Lp-Reg's proxy distribution, arXiv 2510.03222).

    With x = logits / temperature and p = softmax(x), the filter keeps S = {v : p_v >= min_p * max p}, or
    {v : p_v >= fixed_tau} when fixed_tau is given; Z is the mass of S, and the proxy is q = p / Z on S, 0 elsewhere.

    Args:
        logits: [T, V/TP], raw, this rank's slice (ranks hold equal slices in rank order); bf16, fp16, fp32 or fp64.
        targets: [T] int64, sampled tokens as ids in the whole vocabulary.
        vocab_size: the true V; columns at or beyond it are padding. None: there is no padding.
        tp_group: the ranks the vocabulary is split over. None: `logits` hold the whole vocabulary.
        log_z_rows: [T] bool, the same on every rank, the rows whose log Z is needed. None: all.
        entropy: "metric" (no gradient), "grad" or "none".
        inplace_backward: write the gradient over the logits' memory. Only for logits nobody reads after the loss.

    Raises:
        ValueError: arguments that do not fit together, a target outside the vocabulary, a row that is not finite.
    """
    _check_settings(temperature, min_p, fixed_tau, entropy)
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    _check_tensors(logits, targets, log_z_rows, inplace_backward)
    local = logits.shape[1]
    vocab_size = local * ranks if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= local * ranks:
        raise ValueError(f"vocab_size is {vocab_size}, but the logits hold {local} columns on each of {ranks} ranks")
    _check_targets(targets, vocab_size)

    settings = _Settings(
        columns=min(max(vocab_size - rank * local, 0), local),
        temperature=float(temperature),
        log_cut=math.log(min_p if fixed_tau is None else fixed_tau),
        fixed=fixed_tau is not None,
        tp_group=tp_group,
        entropy=entropy,
        inplace=inplace_backward,
    )
    log_probs, entropies, log_z, kept, max_logit = _TokenStats.apply(
        logits, targets - rank * local, log_z_rows, settings
    )
    return TokenStats(log_probs, None if entropy == "none" else entropies, log_z, kept, max_logit)


@dataclass(frozen=True, slots=True)
class _Settings:
    columns: int
    """True vocabulary columns of this rank."""
    temperature: float
    log_cut: float
    """log min_p, or log fixed_tau if `fixed`."""
    fixed: bool
    tp_group: dist.ProcessGroup | None
    entropy: EntropyMode
    inplace: bool


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, columns_of_targets: Tensor, log_z_rows: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, ...]:
        shard = Shard(logits, columns_of_targets, settings.columns, settings.temperature)
        packs = _gather(summarise(shard, with_entropy=settings.entropy != "none"), settings.tp_group)
        max_logit, log_total, entropies, target = _combine(packs)
        _check_finite(log_total)
        log_sum = max_logit + log_total
        # p_v >= min_p * max p and p_v >= tau, both as a cut on x: no softmax needed to know who is kept.
        threshold = (log_sum if settings.fixed else max_logit) + settings.log_cut
        log_z = _log_z(shard, log_z_rows, threshold, log_sum, settings.tp_group)
        kept = target >= threshold

        ctx.settings = settings
        ctx.save_for_backward(logits, columns_of_targets, log_z_rows, log_sum, threshold, entropies, log_z)
        constants = [kept, max_logit] if settings.entropy == "grad" else [kept, max_logit, entropies]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return (target - max_logit) - log_total, entropies, log_z, kept, max_logit

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, grad_log_z: Tensor | None, *_: None
    ) -> tuple[Tensor, None, None, None]:
        logits, columns_of_targets, log_z_rows, log_sum, threshold, entropies, log_z = ctx.saved_tensors
        shard = Shard(logits.detach(), columns_of_targets, ctx.settings.columns, ctx.settings.temperature)
        target = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs / shard.temperature
        kept = dropped = -target
        filtered = None
        if grad_log_z is not None:
            real = log_z > -torch.inf if log_z_rows is None else log_z_rows & (log_z > -torch.inf)
            shift = torch.where(real, grad_log_z / shard.temperature, 0.0)
            # d log Z / dx is q - p: p * (1/Z - 1) inside the filter, -p outside. expm1 keeps its digits near Z = 1.
            kept = torch.where(real, shift * torch.expm1(-log_z), 0.0) - target
            dropped = -target - shift
            filtered = shift != 0
        if grad_entropy is not None:
            grad_entropy = grad_entropy / shard.temperature
        out = shard.logits if ctx.settings.inplace else torch.empty_like(logits)
        gradients = RowGradients(target, kept, dropped, grad_entropy, filtered)
        write_gradient(out, shard, gradients, threshold, log_sum, entropies)
        return out, None, None, None


def _gather(local: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [ranks, ...]. A gather, not a sum: an all-reduce does not promise the same bits on every rank."""
    if tp_group is None or local.numel() == 0:
        return local[None]
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(parts, local, group=tp_group)
    return torch.stack(parts)


def _combine(packs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[ranks, 4, T] of `summarise` -> max x, log sum exp(x - max), entropy, x of the target; all [T]."""
    high, total, weighted, target = packs.unbind(1)
    max_logit = high.amax(0)
    shift = torch.where(high == -torch.inf, 0.0, high - max_logit)
    scale = shift.exp()
    total_all = (total * scale).sum(0)
    weighted_all = ((weighted + shift * total) * scale).sum(0)
    log_total = total_all.log()
    return max_logit, log_total, log_total - weighted_all / total_all, target.amax(0)


def _log_z(
    shard: Shard, wanted: Tensor | None, threshold: Tensor, log_sum: Tensor, tp_group: dist.ProcessGroup | None
) -> Tensor:
    rows = None if wanted is None else wanted.nonzero().squeeze(1)
    inside, outside = _gather(filter_masses(shard, rows, threshold, log_sum), tp_group).sum(0)
    # On a peaked row the kept mass rounds to 1 and its log keeps no digits; the mass outside has them all.
    values = torch.where(outside < 0.5, torch.log1p(-outside), inside.log())
    return values if rows is None else torch.zeros_like(log_sum).index_copy_(0, rows, values)


def _check_settings(temperature: float, min_p: float, fixed_tau: float | None, entropy: str) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if not 0 < min_p <= 1:
        raise ValueError(f"min_p must lie in (0, 1], got {min_p}")
    if fixed_tau is not None and not 0 < fixed_tau <= 1:
        raise ValueError(f"fixed_tau must be None or lie in (0, 1], got {fixed_tau}")
    if entropy not in ("metric", "grad", "none"):
        raise ValueError(f"entropy must be 'metric', 'grad' or 'none', got {entropy!r}")


def _check_tensors(logits: Tensor, targets: Tensor, log_z_rows: Tensor | None, inplace_backward: bool) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [tokens, vocabulary slice], got shape {list(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise ValueError(f"logits must be bfloat16, float16, float32 or float64, got {logits.dtype}")
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward would overwrite a leaf tensor: pass logits computed by a model, or turn it off"
        )
    _check_row_tensor("targets", targets, torch.int64, logits)
    if log_z_rows is not None:
        _check_row_tensor("log_z_rows", log_z_rows, torch.bool, logits)


def _check_row_tensor(name: str, tensor: Tensor, dtype: torch.dtype, logits: Tensor) -> None:
    if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or tensor.device != logits.device:
        raise ValueError(
            f"{name} must be {dtype} of shape [{logits.shape[0]}] on {logits.device} to fit the logits, "
            f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
        )


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    wrong = (targets < 0) | (targets >= vocab_size)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary of {vocab_size}; "
            "leave out tokens that carry no loss before the call"
        )


def _check_finite(log_total: Tensor) -> None:
    """After the gather, so that every rank raises and none waits for the others."""
    bad = ~torch.isfinite(log_total)
    if bad.any():
        rows: Sequence[int] = bad.nonzero().squeeze(1)[:5].tolist()
        raise ValueError(
            f"logits of {int(bad.sum())} of {bad.numel()} rows hold NaN or +inf, or only -inf; first rows: {rows}"
        )
