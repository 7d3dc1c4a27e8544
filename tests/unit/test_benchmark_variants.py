"""Variants of the token-statistics benchmark that are said to be equal compute the same loss and gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks.token_stats import GROUPS
from benchmarks.token_stats_variants import ENTROPY_TERMS, VARIANTS, Problem, why_not

SAME = (
    "naive",
    "ours, Z on 1 %",
    "ours, Z on all rows",
    "head, naive",
    "head, ours, recompute",
    "head, ours, in forward",
)


@pytest.mark.parametrize("variant", SAME)
def test_variants_compute_the_same_loss_and_gradient(variant: str) -> None:
    def run(name: str) -> tuple[float, Problem]:
        problem = Problem.random(64, 101, 16, torch.float32)
        refill, step = VARIANTS[name](problem)
        refill()
        return step(), problem

    loss, problem = run(variant)
    want, plain = run("head, naive")
    assert loss == pytest.approx(want, rel=1e-5)
    if problem.hidden.grad is not None:
        torch.testing.assert_close(problem.hidden.grad, plain.hidden.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(problem.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("term", ENTROPY_TERMS)
def test_an_entropy_term_is_that_of_the_definition_with_and_without_the_head(term: str) -> None:
    def step(name: str) -> tuple[float, Problem]:
        problem = Problem.random(64, 101, 16, torch.float32)
        refill, step = VARIANTS[name](problem)
        refill()
        return step(), problem

    loss, problem = step(f"head, {term}")
    weight, hidden = problem.weight.detach().requires_grad_(), problem.hidden.detach()
    log_p = torch.log_softmax(hidden @ weight.t(), -1)
    p = log_p.exp()
    ranked, order = p.sort(-1, descending=True)
    before = torch.zeros_like(p).scatter(1, order, ranked.cumsum(-1) - ranked)
    kept = {
        "no entropy term": torch.zeros_like(p, dtype=torch.bool),
        "entropy bonus": torch.ones_like(p, dtype=torch.bool),
        "TRE, top-k 2": p >= ranked[:, 1:2],
        "TRE, top-p .99": before < 0.99,
        "TRE, min-p .02": p >= 0.02 * ranked[:, :1],
    }[term]
    q = p * kept / (p * kept).sum(-1, keepdim=True).clamp(min=1e-30)
    entropy = -(q * q.clamp(min=1e-30).log()).sum(-1)
    sampled = log_p.gather(1, problem.targets[:, None])[:, 0]
    want = -(problem.advantages * sampled).sum() / 64 - 0.001 * entropy.mean()
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-4) and step(term)[0] == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(problem.weight.grad, weight.grad, rtol=1e-4, atol=1e-7)


def test_every_variant_is_in_a_group() -> None:
    assert {variant for variants in GROUPS.values() for variant in variants} == set(VARIANTS)


def test_a_variant_that_cannot_run_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_kernel" else object())
    assert why_not("head, Liger, cross-entropy", "cuda") == "not installed: liger_kernel"
    assert why_not("naive", "cpu") is None and why_not("head, TRL", "cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not("Liger, cross-entropy", "cpu") == "a Triton kernel: it runs on a CUDA device only"
    assert why_not("Liger, cross-entropy", "cuda") is None
