"""Variants of the token-statistics benchmark that are said to be equal compute the same loss and gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks.token_stats import GROUPS
from benchmarks.token_stats_variants import VARIANTS, Problem, why_not

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


def test_every_variant_is_in_a_group() -> None:
    assert {variant for variants in GROUPS.values() for variant in variants} == set(VARIANTS)


def test_a_variant_that_cannot_run_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_kernel" else object())
    assert why_not("head, Liger, cross-entropy", "cuda") == "not installed: liger_kernel"
    assert why_not("naive", "cpu") is None and why_not("head, TRL", "cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not("Liger, cross-entropy", "cpu") == "a Triton kernel: it runs on a CUDA device only"
    assert why_not("Liger, cross-entropy", "cuda") is None
