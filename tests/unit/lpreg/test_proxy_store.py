"""The full KL against another policy's stored proxy: values and gradients against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpreg import LossInputs, ProxyStore, fused_loss, fused_token_stats, make_loss, token_stats
from lpreg.statistics import shard

TOKENS, VOCAB, WIDTH = 30, 23, 7


def two_policies(seed: int = 0, tokens: int = TOKENS, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Hidden states and heads of an old policy and of the one in training; fp64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64)
    return {
        "hidden": hidden,
        "weight": weight,
        "old_logits": hidden @ weight.T,
        "new_weight": weight + 0.5 * torch.randn(vocab, WIDTH, generator=generator, dtype=torch.float64),
        "targets": torch.randint(vocab, (tokens,), generator=generator),
        "rows": torch.rand(tokens, generator=generator) < 0.5,
        "weights": torch.randn(4, tokens, generator=generator, dtype=torch.float64),
    }


def dense_kl(dense: Callable, old_logits: Tensor, logits: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    """[T], sum over S of q (log q - log p) by whole tensors."""
    q = dense(old_logits, targets, **settings).q
    log_p = dense(logits, targets, **settings).log_p
    return torch.where(q > 0, q * (q.clamp_min(1e-300).log() - log_p), 0.0).sum(-1)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "tokens": draw(st.integers(0, 9)),
        "vocab": draw(st.integers(1, 30)),
        "padding": draw(st.integers(0, 5)),
        "temperature": draw(st.sampled_from([1.0, 0.7, 1.6])),
        "filters": draw(st.sampled_from([{"min_p": 0.02}, {"min_p": 0.4}, {"fixed_tau": 0.03}, {"min_p": 1e-300}])),
        "seed": draw(st.integers(0, 2**31)),
        "work": draw(st.sampled_from([1, 64, 2**18])),
        "inplace": draw(st.booleans()),
    }


@given(case=cases())
def test_value_and_gradient_match_the_definition(dense: Callable, case: dict[str, Any]) -> None:
    data = two_policies(case["seed"], case["tokens"], case["vocab"])
    shared = {"temperature": case["temperature"], **case["filters"]}
    logits, targets, rows, weights = (
        data["hidden"] @ data["new_weight"].T,
        data["targets"],
        data["rows"],
        data["weights"],
    )
    garbage = torch.full((case["tokens"], case["padding"]), torch.nan, dtype=torch.float64)

    with mock.patch.object(shard, "CPU_WORK_ELEMENTS", case["work"]):
        old = token_stats(data["old_logits"], targets, proxy_rows=rows, **shared)
        assert old.proxy_store is not None and old.proxy_kl is None
        leaf = torch.cat([logits, garbage], 1).requires_grad_()
        got = token_stats(
            leaf * 1,
            targets,
            vocab_size=case["vocab"],
            entropy="grad",
            inplace_backward=case["inplace"],
            proxy=old.proxy_store,
            **shared,
        )
        assert got.proxy_kl is not None and got.entropy is not None
        # Unstored rows get no gradient of proxy_kl, though the loss weighs them.
        loss = (weights[0] * got.proxy_kl + weights[1] * got.log_probs + weights[2] * got.entropy).sum()
        (loss + (weights[3] * got.log_z).sum()).backward()

    plain = logits.clone().requires_grad_()
    want = dense(plain, targets, **shared)
    kl = torch.where(rows, dense_kl(dense, data["old_logits"], plain, targets, **shared), 0.0)
    loss = (weights[0] * kl + weights[1] * want.log_probs + weights[2] * want.entropy).sum()
    (loss + (weights[3] * torch.where(want.log_z > -torch.inf, want.log_z, 0.0)).sum()).backward()
    torch.testing.assert_close(got.proxy_kl, kl, rtol=1e-9, atol=1e-12)
    assert leaf.grad is not None and plain.grad is not None
    torch.testing.assert_close(leaf.grad[:, : case["vocab"]], plain.grad, rtol=1e-9, atol=1e-12)
    assert (leaf.grad[:, case["vocab"] :] == 0).all()


def test_the_gradient_is_p_minus_q_and_bounded(dense: Callable) -> None:
    data = two_policies()
    store = token_stats(data["old_logits"], data["targets"], proxy_rows=data["rows"]).proxy_store
    # Far from the old policy, where the gradient of k3 would be unbounded.
    leaf = (-30 * data["old_logits"]).requires_grad_()
    stats = token_stats(leaf, data["targets"], proxy=store)
    assert stats.proxy_kl is not None
    stats.proxy_kl.sum().backward()
    q = dense(data["old_logits"], data["targets"]).q
    want = torch.where(data["rows"][:, None], leaf.detach().softmax(-1) - q, 0.0)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-14)
    assert leaf.grad.abs().max() <= 1


def test_the_policys_own_store_gives_minus_log_z_and_its_gradient() -> None:
    data = two_policies()
    leaf = data["old_logits"].clone().requires_grad_()
    stats = token_stats(leaf, data["targets"])
    store = token_stats(leaf, data["targets"], proxy_rows=torch.ones(TOKENS, dtype=torch.bool)).proxy_store
    of_log_z = torch.autograd.grad(-stats.log_z.sum(), leaf)[0]
    kl = token_stats(leaf, data["targets"], proxy=store).proxy_kl
    assert kl is not None
    torch.testing.assert_close(kl, -stats.log_z, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), leaf)[0], of_log_z, rtol=1e-12, atol=1e-14)


def test_gradcheck() -> None:
    data = two_policies(tokens=5)
    store = token_stats(data["old_logits"], data["targets"], proxy_rows=data["rows"]).proxy_store

    def kl(logits: Tensor) -> Tensor:
        found = token_stats(logits, data["targets"], proxy=store).proxy_kl
        assert found is not None
        return found

    assert torch.autograd.gradcheck(kl, (data["old_logits"] * 0.5).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_store_of_low_precision_logits(dense: Callable, dtype: torch.dtype) -> None:
    data = two_policies(vocab=400)
    old, new = data["old_logits"].to(dtype), (data["hidden"] @ data["new_weight"].T).to(dtype)
    store = token_stats(old, data["targets"], proxy_rows=data["rows"]).proxy_store
    leaf = new.clone().requires_grad_()
    stats = token_stats(leaf * 1, data["targets"], proxy=store, inplace_backward=True)
    assert store is not None and store.log_q.dtype == torch.float32 and stats.proxy_kl is not None
    stats.proxy_kl.sum().backward()
    plain = new.double().requires_grad_()
    want = torch.where(data["rows"], dense_kl(dense, old.double(), plain, data["targets"]), 0.0)
    want.sum().backward()
    torch.testing.assert_close(stats.proxy_kl, want.float(), rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None and plain.grad is not None
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(leaf.grad, plain.grad.to(dtype), rtol=bound, atol=bound)


def test_the_store_holds_the_filter_and_little_else(dense: Callable) -> None:
    data = two_policies()
    store = token_stats(data["old_logits"], data["targets"], proxy_rows=data["rows"], min_p=0.3).proxy_store
    assert store is not None
    q = dense(data["old_logits"], data["targets"], min_p=0.3).q
    stored = data["rows"].nonzero().squeeze(1)
    assert store.counts.tolist() == torch.where(data["rows"], (q > 0).sum(-1), 0).tolist()
    assert store.ids.tolist() == q[stored].nonzero()[:, 1].tolist()
    torch.testing.assert_close(store.log_q.exp(), q[stored][q[stored] > 0])


@pytest.mark.parametrize("sizes", [[30], [0, 7, 1, 22], [10, 10, 10, 0]])
def test_a_store_is_split_and_joined_per_token(sizes: list[int]) -> None:
    data = two_policies()
    stats = token_stats(data["old_logits"], data["targets"], proxy_rows=data["rows"])
    assert stats.proxy_store is not None
    parts = stats.proxy_store.split(sizes)
    assert [len(part.stored) for part in parts] == sizes
    logits = data["hidden"] @ data["new_weight"].T
    whole, joined = (
        token_stats(logits, data["targets"], proxy=store).proxy_kl
        for store in (stats.proxy_store, ProxyStore.join(parts))
    )
    assert whole is not None and joined is not None and torch.equal(whole, joined)
    at = 0
    for part, size in zip(parts, sizes, strict=True):
        some = token_stats(logits[at : at + size], data["targets"][at : at + size], proxy=part).proxy_kl
        assert some is not None and torch.equal(some, whole[at : at + size])
        at += size


def test_a_filter_that_keeps_nothing_stores_nothing() -> None:
    data = two_policies()
    rows = torch.ones(TOKENS, dtype=torch.bool)
    store = token_stats(data["old_logits"] * 0, data["targets"], proxy_rows=rows, fixed_tau=0.9).proxy_store
    assert store is not None and store.ids.numel() == 0
    kl = token_stats(data["old_logits"], data["targets"], proxy=store).proxy_kl
    assert kl is not None and (kl == 0).all()


def test_log_z_is_computed_for_rows_that_are_stored() -> None:
    data = two_policies()
    rows, none = data["rows"], torch.zeros(TOKENS, dtype=torch.bool)
    stats = token_stats(data["old_logits"], data["targets"], proxy_rows=rows, log_z_rows=none)
    want = token_stats(data["old_logits"], data["targets"], log_z_rows=rows).log_z
    assert torch.equal(stats.log_z, want)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_fused_head_gives_the_same_store_and_kl(chunk: int) -> None:
    data = two_policies()
    rows, targets, hidden = data["rows"], data["targets"], data["hidden"]
    store = token_stats(data["old_logits"], targets, proxy_rows=rows, min_p=0.1).proxy_store
    fused = fused_token_stats(
        hidden, data["weight"], targets, chunk_tokens=chunk, proxy_rows=rows, min_p=0.1
    ).proxy_store
    assert store is not None and fused is not None
    assert torch.equal(store.counts, fused.counts) and torch.equal(store.ids, fused.ids)
    torch.testing.assert_close(store.log_q, fused.log_q, rtol=1e-12, atol=1e-12)

    gradients = []
    for kind in ("whole", "fused"):
        leaves = hidden.clone().requires_grad_(), data["new_weight"].clone().requires_grad_()
        if kind == "whole":
            stats = token_stats(leaves[0] @ leaves[1].T, targets, proxy=store)
        else:
            stats = fused_token_stats(*leaves, targets, proxy=store, chunk_tokens=chunk)
        assert stats.proxy_kl is not None
        loss = (data["weights"][0] * stats.proxy_kl + data["weights"][1] * stats.log_probs).sum()
        gradients.append((stats.proxy_kl.detach(), *torch.autograd.grad(loss, leaves)))
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", ["old", "lagged"])
def test_lp_reg_with_the_full_kl(dense: Callable, source: str) -> None:
    """Compares the loss with equation 6, and with the fused loss."""
    data = two_policies()
    loss = make_loss("lp_reg", kl_estimator="full", proxy_source=source, min_p=0.1, beta=0.7, clip_low=0.5)
    filters = loss.token_stats_kwargs()
    selected = data["rows"]
    other = token_stats(data["old_logits"], data["targets"], proxy_rows=selected, **filters)
    old = {"old_log_probs": other.log_probs, "old_log_z": other.log_z, "old_in_filter": other.in_filter}
    lagged = {"old_log_probs": other.log_probs, "proxy_log_probs": other.proxy_log_probs}
    fields = {
        "advantages": data["weights"][0],
        "selection": selected,
        "denominator": TOKENS,
        **(old if source == "old" else lagged),
    }
    leaves = data["hidden"].clone().requires_grad_(), data["new_weight"].clone().requires_grad_()
    logits = leaves[0] @ leaves[1].T
    stats = token_stats(logits, data["targets"], proxy=other.proxy_store, **filters)
    inputs = LossInputs(
        log_probs=stats.log_probs, log_z=stats.log_z, in_filter=stats.in_filter, proxy_kl=stats.proxy_kl, **fields
    )
    got = loss(inputs)

    want = dense(logits, data["targets"], min_p=0.1)
    advantages, ratio = data["weights"][0], (want.log_probs - other.log_probs).exp()
    bounded = torch.where(advantages < 0, ratio.clamp(min=0.5), ratio).clamp(max=10.0)
    acts = selected & (advantages < 0) & other.in_filter
    assert 0 < int(acts.sum()) < int(selected.sum())
    kl = dense_kl(dense, data["old_logits"], logits, data["targets"], min_p=0.1)
    value = (-bounded * advantages + 0.7 * torch.where(acts, kl, 0.0)).mean()
    torch.testing.assert_close(got.loss, value, rtol=1e-10, atol=1e-12)
    assert got.metrics["kl"].value == pytest.approx(float(kl[acts].detach().mean()))
    gradients = torch.autograd.grad(value, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got.loss, leaves), gradients, rtol=1e-9, atol=1e-12)

    output, _ = fused_loss(*leaves, data["targets"], loss, fields, proxy=other.proxy_store, chunk_tokens=7)
    torch.testing.assert_close(output.loss, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(output.loss, leaves), gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stored": torch.ones(2)}, "stored must be bool"),
        ({"counts": torch.ones(3, dtype=torch.int64)}, r"counts must be int64 of shape \[2\]"),
        (
            {"ids": torch.zeros(4, dtype=torch.int64)},
            r"both of shape \[E\], got torch\.int64 \[4\]",
        ),
        ({"log_q": torch.zeros(1)}, r"both of shape \[E\]"),
        ({"counts": torch.tensor([1, 2])}, "there are 2 ids, but counts sum up to 3"),
    ],
)
def test_an_inconsistent_store_is_refused(change: dict[str, Tensor], message: str) -> None:
    fields = {
        "stored": torch.ones(2, dtype=torch.bool),
        "counts": torch.ones(2, dtype=torch.int64),
        "ids": torch.zeros(2, dtype=torch.int64),
        "log_q": torch.zeros(2),
    }
    ProxyStore(**fields)
    with pytest.raises(ValueError, match=message):
        ProxyStore(**fields | change)


def test_a_store_that_does_not_fit_the_logits_is_refused() -> None:
    data = two_policies()
    store = token_stats(
        data["old_logits"][:4], data["targets"][:4], proxy_rows=torch.ones(4, dtype=torch.bool)
    ).proxy_store
    with pytest.raises(ValueError, match=r"proxy\.stored must be torch\.bool of shape \[30\]"):
        token_stats(data["old_logits"], data["targets"], proxy=store)
    with pytest.raises(ValueError, match=r"proxy_rows must be torch\.bool of shape \[30\]"):
        fused_token_stats(data["hidden"], data["weight"], data["targets"], proxy_rows=data["rows"][:5])
