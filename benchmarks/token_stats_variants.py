"""Ways to compute the gradients of an Lp-Reg loss from logits, or from hidden states and an LM head.

All compute the same loss, -sum A log p + sum over 1 % of the tokens of KL(q || p), unless their docstrings say
otherwise. A variant is prepared once and returns (refill, step): `refill` restores what `step` overwrote and is not
measured. Legend: T tokens, V vocabulary, d width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lpreg import LossInputs, LossOutput, PolicyLoss, TokenStats, fused_loss, fused_token_stats, token_stats

Step = tuple[Callable[[], None], Callable[[], float]]
MIN_P, MASKED = 0.02, -1e4


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    """[T, d], a leaf."""
    weight: Tensor
    """[V, d], a leaf."""
    targets: Tensor
    advantages: Tensor
    selection: Tensor
    """bool [T], True for 1 % of the tokens."""

    @classmethod
    def random(cls, tokens: int, vocab: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Problem:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator) * (4 / width**0.5)
        selection = torch.zeros(tokens, dtype=torch.bool)
        selection[torch.randperm(tokens, generator=generator)[: max(1, tokens // 100)]] = True
        return cls(
            hidden.to(device, dtype).requires_grad_(),
            weight.to(device, dtype).requires_grad_(),
            torch.randint(vocab, (tokens,), generator=generator).to(device),
            torch.randn(tokens, generator=generator).to(device),
            selection.to(device),
        )

    def loss(self, log_probs: Tensor, kl: Tensor) -> Tensor:
        return (-self.advantages * log_probs + torch.where(self.selection, kl, 0.0)).sum() / self.targets.shape[0]


class _Sink(torch.autograd.Function):
    """Makes given logits look like the output of a model: they are no leaf, and their gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _on_logits(problem: Problem, loss_of: Callable[[Tensor], Tensor]) -> Step:
    logits = problem.hidden.new_empty(problem.hidden.shape[0], problem.weight.shape[0], requires_grad=False)
    anchor = logits.new_zeros((), requires_grad=True)

    def refill() -> None:
        with torch.no_grad():
            torch.mm(problem.hidden, problem.weight.t(), out=logits)

    def step() -> float:
        loss = loss_of(_Sink.apply(anchor, logits))
        loss.backward()
        return float(loss.detach())

    return refill, step


def _on_head(problem: Problem, loss_of: Callable[[], Tensor]) -> Step:
    def refill() -> None:
        problem.hidden.grad = problem.weight.grad = None

    def step() -> float:
        loss = loss_of()
        loss.backward()
        return float(loss.detach())

    return refill, step


def _naive_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log p of the targets, KL(q || p) with q frozen, and entropy: the definitions on whole tensors."""
    log_p = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        p = torch.softmax(logits.float(), -1)
        entropy = -(p * log_p).sum(-1)
        outside = p < MIN_P * p.amax(-1, keepdim=True)
        log_q = torch.log_softmax(logits.float().masked_fill(outside, MASKED), -1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), kl, entropy


def naive(problem: Problem, compiled: bool = False) -> Step:
    statistics = torch.compile(_naive_statistics) if compiled else _naive_statistics
    return _on_logits(problem, lambda logits: problem.loss(*statistics(logits, problem.targets)[:2]))


def _ours(problem: Problem, stats: TokenStats) -> Tensor:
    return problem.loss(stats.log_probs, -stats.log_z)


def materialised(problem: Problem, all_rows: bool = False) -> Step:
    rows = None if all_rows else problem.selection
    return _on_logits(
        problem,
        lambda x: _ours(problem, token_stats(x, problem.targets, log_z_rows=rows, inplace_backward=True)),
    )


def naive_head(problem: Problem) -> Step:
    return _on_head(
        problem,
        lambda: problem.loss(*_naive_statistics(problem.hidden @ problem.weight.t(), problem.targets)[:2]),
    )


def published_passes(problem: Problem) -> Step:
    """The passes of the published code: one for old log-probs and entropy, one for the min-p proxy, and one to train
    with k3 on the sampled token (spec: 1, 5 and 7 of its departures). So the loss is another one."""

    def log_probs_of(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1).gather(1, problem.targets[:, None]).squeeze(1)

    def entropy_of(logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)

    def loss_of() -> Tensor:
        with torch.no_grad():
            logits = (problem.hidden @ problem.weight.t()).float()
            old, _ = log_probs_of(logits), entropy_of(logits)
            del logits
            masked = (problem.hidden @ problem.weight.t()).float()
            p = torch.softmax(masked, -1)
            masked = masked.clone().masked_fill_(p < MIN_P * p.amax(-1, keepdim=True), MASKED)
            del p
            proxy, _ = log_probs_of(masked), entropy_of(masked)
            del masked
        log_probs = log_probs_of((problem.hidden @ problem.weight.t()).float())
        gap = proxy - log_probs
        ratio = (log_probs - old).exp()
        return problem.loss(ratio, (gap.exp() - gap - 1).clamp(-10, 10))

    return _on_head(problem, loss_of)


def torch_linear_cross_entropy(problem: Problem) -> Step:
    """PyTorch's own fused LM head: cross-entropy alone, without advantages, entropy or filter."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512, chunking_method=None)
    fused = torch.nn.functional.linear_cross_entropy
    return _on_head(problem, lambda: fused(problem.hidden, problem.weight, problem.targets, options=options))


def fused_recompute(problem: Problem) -> Step:
    return _on_head(
        problem,
        lambda: _ours(
            problem,
            fused_token_stats(problem.hidden, problem.weight, problem.targets, log_z_rows=problem.selection),
        ),
    )


def entropy_term(problem: Problem, *, head: bool, entropy: str = "metric", **region: Any) -> Step:
    """Log-probs with their gradient, and an entropy with its gradient: none, the policy's own, or that of plausible
    tokens (TRE), which `region` names by an argument of `token_stats`. So the loss is another one."""
    no_rows = torch.zeros_like(problem.selection)
    settings: Any = region | {
        "entropy": entropy,
        "filter_entropy": bool(region),
        "log_z_rows": None if region else no_rows,
    }

    def loss_of(stats: TokenStats) -> Tensor:
        bonus = stats.filter_entropy if region else stats.entropy if entropy == "grad" else None
        loss = problem.loss(stats.log_probs, torch.zeros_like(stats.log_probs))
        return loss if bonus is None else loss - 0.001 * bonus.mean()

    if head:
        return _on_head(
            problem, lambda: loss_of(fused_token_stats(problem.hidden, problem.weight, problem.targets, **settings))
        )
    return _on_logits(problem, lambda x: loss_of(token_stats(x, problem.targets, inplace_backward=True, **settings)))


ENTROPY_TERMS: dict[str, dict[str, Any]] = {
    "no entropy term": {},
    "entropy bonus": {"entropy": "grad"},
    "TRE, top-k 2": {"top_k": 2},
    "TRE, top-p .99": {"top_p": 0.99},
    "TRE, min-p .02": {"min_p": 0.02},
}


class _FullLpReg(PolicyLoss):
    """`Problem.loss` as a policy loss of lpreg."""

    name = "benchmark"

    def __call__(self, inputs: LossInputs) -> LossOutput:
        kl = torch.where(self.need(inputs.selection, "selection"), -self.need(inputs.log_z, "log_z"), 0.0)
        return LossOutput((-inputs.advantages * inputs.log_probs + kl).sum() / inputs.denominator, {})


def fused_in_forward(problem: Problem) -> Step:
    fields = {
        "advantages": problem.advantages,
        "selection": problem.selection,
        "denominator": problem.targets.shape[0],
    }

    def loss_of() -> Tensor:
        head = (problem.hidden, problem.weight, problem.targets)
        return fused_loss(*head, _FullLpReg(None), fields, log_z_rows=problem.selection)[0].loss

    return _on_head(problem, loss_of)


def products(problem: Problem, count: int) -> Step:
    """The matrix products alone, on whole matrices: logits (twice if they are recomputed), d hidden, d weight."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> float:
        for _ in range(count - 2):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.t(), hidden, out=d_weight)
        return 0.0

    return lambda: None, step


def liger_cross_entropy(problem: Problem) -> Step:
    """Liger's Triton kernel: cross-entropy alone; the forward overwrites the logits with their gradient."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return _on_logits(problem, lambda logits: liger_cross_entropy(logits, problem.targets))


def liger_fused_linear(problem: Problem) -> Step:
    """Liger's fused LM head: cross-entropy alone, in chunks; the forward computes the gradients."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return _on_head(problem, lambda: liger_fused_linear_cross_entropy(problem.hidden, problem.weight, problem.targets))


def liger_chunked_grpo(problem: Problem) -> Step:
    """Liger's GRPO loss with the LM head (PyTorch, no kernel): no entropy, no filter, sequences of 64 tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=False)
    rows = problem.targets.view(-1, min(64, len(problem.targets)))
    hidden = problem.hidden.view(*rows.shape, -1)
    mask, advantages = torch.ones_like(rows), problem.advantages.view(rows.shape)[:, 0]
    return _on_head(problem, lambda: loss(hidden, problem.weight, rows, mask, advantages)[0])


def trl_chunked(problem: Problem) -> Step:
    """TRL's fused LM head, by recomputation: log-probs with gradient, entropy without gradient, no filter."""
    from trl.kernels import ChunkedLogProbFunction

    def loss_of() -> Tensor:
        head = (problem.hidden, problem.weight, None, problem.targets)
        log_probs, *_ = ChunkedLogProbFunction.apply(*head, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))
        return problem.loss(log_probs, torch.zeros_like(log_probs))

    return _on_head(problem, loss_of)


NEEDS = {
    "Liger, cross-entropy": ("liger_kernel", "triton"),
    "head, Liger, cross-entropy": ("liger_kernel", "triton"),
    "head, Liger, chunked GRPO": ("liger_kernel", "triton"),
    "head, TRL": ("trl",),
}
"""Packages of other projects that a variant needs."""
TRITON_ONLY = ("Liger, cross-entropy", "head, Liger, cross-entropy")


def why_not(variant: str, device: str) -> str | None:
    """Returns the reason why the variant cannot run here; None if it can."""
    missing = [package for package in NEEDS.get(variant, ()) if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if variant in TRITON_ONLY and device == "cpu":
        return "a Triton kernel: it runs on a CUDA device only"
    return None


VARIANTS: dict[str, Callable[[Problem], Step]] = {
    "naive": naive,
    "naive compiled": lambda problem: naive(problem, compiled=True),
    "ours, Z on 1 %": materialised,
    "ours, Z on all rows": lambda problem: materialised(problem, all_rows=True),
    "Liger, cross-entropy": liger_cross_entropy,
    "head, naive": naive_head,
    "head, published passes": published_passes,
    "head, torch cross-entropy": torch_linear_cross_entropy,
    "head, Liger, cross-entropy": liger_fused_linear,
    "head, Liger, chunked GRPO": liger_chunked_grpo,
    "head, TRL": trl_chunked,
    "head, ours, recompute": fused_recompute,
    "head, ours, in forward": fused_in_forward,
    "3 products alone": lambda problem: products(problem, 3),
    "4 products alone": lambda problem: products(problem, 4),
    **{name: partial(entropy_term, head=False, **settings) for name, settings in ENTROPY_TERMS.items()},
    **{f"head, {name}": partial(entropy_term, head=True, **settings) for name, settings in ENTROPY_TERMS.items()},
}
