"""The sparse store of another policy's proxy with the vocabulary split over real processes: each rank stores and reads
its own columns, and the KL and its gradient are those of the whole vocabulary.

The tests start four ranks once and compare what these return.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import ProxyStore, fused_token_stats, token_stats
from tests.invariance.ranks import RANKS, Results, run_ranks, split

SPLITS = (2, 4)
TOKENS, WIDTH = 37, 8


@dataclass(frozen=True)
class Case:
    columns: int = 96
    """Number of columns of all ranks together, padding included."""
    vocab: int = 96
    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "warm": Case(settings={"temperature": 0.7, "min_p": 0.2}),
    "fixed threshold": Case(settings={"fixed_tau": 0.02}),
    "everything kept": Case(settings={"min_p": 1e-300}),
    "two shards all padding": Case(40, 17),
    "fp32": Case(512, 500, torch.float32),
}


def run(case: Case, fused: bool, group: dist.ProcessGroup | None, rank: int, ranks: int, whole: bool) -> Results:
    """`whole`: read a store that holds every rank's entries in place of the rank's own."""
    generator = torch.Generator().manual_seed(case.columns)
    hidden, targets = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64), torch.arange(TOKENS) % 17
    old = torch.randn(case.columns, WIDTH, generator=generator, dtype=torch.float64)
    new = old + 0.5 * torch.randn(case.columns, WIDTH, generator=generator, dtype=torch.float64)
    old[case.vocab :] = new[case.vocab :] = torch.nan
    rows = torch.rand(TOKENS, generator=generator) < 0.5
    width = case.columns // ranks
    mine = slice(rank * width, (rank + 1) * width)

    def stats(weight: Tensor, group: dist.ProcessGroup | None, **more: Any) -> Any:
        settings = {"tp_group": group, "vocab_size": case.vocab, **case.settings, **more}
        if fused:
            return fused_token_stats(hidden.to(case.dtype), weight, targets, chunk_tokens=5, **settings)
        return token_stats(hidden.to(case.dtype) @ weight.T, targets, **settings)

    old = old.to(case.dtype)
    store = stats(*((old, None) if whole else (old[mine], group)), proxy_rows=rows).proxy_store
    leaf = new[mine].to(case.dtype).requires_grad_()
    found = stats(leaf, group, proxy=store)
    (found.proxy_kl * torch.linspace(-1, 1, TOKENS)).sum().backward()
    assert leaf.grad is not None
    return {"kl": found.proxy_kl.detach(), "grad": leaf.grad, "store": store, "log_probs": found.log_probs.detach()}


def merged(stores: list[ProxyStore]) -> list[list[tuple[int, float]]]:
    """For each token its (id, log q) over all ranks."""
    entries: list[list[tuple[int, float]]] = [[] for _ in range(TOKENS)]
    for store in stores:
        tokens = torch.repeat_interleave(store.counts).tolist()
        for token, number, log_q in zip(tokens, store.ids.tolist(), store.log_q.tolist(), strict=True):
            entries[token].append((number, log_q))
    return entries


def plain(results: Results) -> Results:
    """With the store as tensors that torch.load takes."""
    store = results.pop("store")
    return results | {name: getattr(store, name) for name in ("stored", "counts", "ids", "log_q")}


def work(rank: int) -> Results:
    return {
        (ranks, name, fused, whole): plain(run(case, fused, group, place, ranks, whole))
        for ranks, group, place in split(rank, SPLITS)
        for name, case in CASES.items()
        for fused in (False, True)
        for whole in (False, True)
    }


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_split_does_not_change_the_results(by_rank: list[Results], name: str, ranks: int, fused: bool) -> None:
    case = CASES[name]
    want = run(case, fused, None, 0, 1, whole=False)
    rounding = {torch.float64: 1e-11, torch.float32: 1e-5}[case.dtype]
    for whole in (False, True):
        parts = [by_rank[rank][ranks, name, fused, whole] for rank in range(RANKS)]
        for part in parts:
            for statistic in ("kl", "log_probs"):
                assert torch.equal(part[statistic], parts[0][statistic]), "not the same bits on every rank"
        torch.testing.assert_close(parts[0]["kl"], want["kl"], rtol=rounding, atol=rounding)
        gradient = torch.cat([part["grad"] for part in parts[:ranks]])
        torch.testing.assert_close(gradient, want["grad"], rtol=10 * rounding, atol=rounding)
        assert (gradient[case.vocab :] == 0).all()


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_each_rank_stores_its_own_columns_of_the_filter(by_rank: list[Results], name: str, ranks: int) -> None:
    case = CASES[name]
    width = case.columns // ranks
    parts = [by_rank[rank][ranks, name, False, False] for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert ((part["ids"] >= rank * width) & (part["ids"] < (rank + 1) * width)).all()
    stores = [ProxyStore(part["stored"], part["counts"], part["ids"], part["log_q"]) for part in parts]
    found, want = merged(stores), merged([run(case, False, None, 0, 1, whole=False)["store"]])
    assert [[number for number, _ in token] for token in found] == [[number for number, _ in token] for token in want]
    both = [torch.tensor([log_q for token in entries for _, log_q in token]) for entries in (found, want)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
