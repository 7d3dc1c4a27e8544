"""token_stats with the vocabulary split over real processes: the same bits on every rank, the same numbers as unsplit,
few and small collectives.

The tests start four ranks once and compare what these return.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import token_stats
from lpreg.statistics.row_statistics import Filter
from tests.invariance.ranks import RANKS, Results, run_ranks, split

SPLITS = (2, 4)
TOKENS = 37
FLOATS = ("log_probs", "entropy", "log_z", "max_logit", "filter_entropy", "filter_extent")
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce_scatter", "broadcast", "all_to_all")


@dataclass(frozen=True)
class Case:
    columns: int
    """Number of columns of all ranks together, padding included."""
    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict)
    some_rows: bool = True
    banned: tuple[int, int] = (0, 0)
    """First and last + 1 of the columns whose logits are -inf on every third row."""


CASES = {
    "plain": Case(96),
    "warm": Case(96, settings={"temperature": 0.7}),
    "padded": Case(96, settings={"vocab_size": 83, "entropy": "grad"}),
    "two shards all padding": Case(40, settings={"vocab_size": 17, "entropy": "grad"}),
    "one true column": Case(8, settings={"vocab_size": 1}, some_rows=False),
    "fixed threshold": Case(96, settings={"fixed_tau": 0.02}, some_rows=False),
    "threshold that keeps nothing": Case(96, settings={"fixed_tau": 0.9}, some_rows=False),
    "likeliest": Case(96, settings={"top_k": 5, "filter_entropy": True}),
    "likeliest, more than a shard has": Case(96, settings={"top_k": 30, "filter_entropy": True, "vocab_size": 60}),
    "nucleus": Case(96, settings={"top_p": 0.9, "filter_entropy": True}, some_rows=False),
    "entropy of the proxy": Case(96, settings={"min_p": 0.1, "filter_entropy": True, "entropy": "grad"}),
    "a shard of impossible tokens": Case(96, settings={"entropy": "grad"}, banned=(24, 48)),
    "no entropy": Case(96, settings={"entropy": "none"}),
    "in place": Case(96, settings={"inplace_backward": True, "entropy": "grad"}),
    "fp32": Case(512, torch.float32, {"vocab_size": 500}),
    "bf16": Case(512, torch.bfloat16, {"vocab_size": 500, "inplace_backward": True}),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Logits [TOKENS, columns] with NaN in the padding, targets, rows that need log Z, weights of a loss."""
    generator = torch.Generator().manual_seed(case.columns)
    logits = torch.randn(TOKENS, case.columns, generator=generator, dtype=torch.float64) * 3
    vocab = case.settings.get("vocab_size", case.columns)
    logits[:, vocab:] = torch.nan
    logits[::3, slice(*case.banned)] = -torch.inf
    targets = torch.randint(vocab, (TOKENS,), generator=generator)
    targets[logits[torch.arange(TOKENS), targets] == -torch.inf] = 0
    rows = torch.rand(TOKENS, generator=generator) < 0.4 if case.some_rows else None
    weights = torch.randn(3, TOKENS, generator=generator, dtype=torch.float64)
    weights *= torch.rand(3, TOKENS, generator=generator) < 0.7
    return logits.to(case.dtype), targets, rows, weights


def run(case: Case, group: dist.ProcessGroup | None, rank: int, ranks: int) -> dict[str, Tensor]:
    logits, targets, rows, weights = inputs(case)
    width = case.columns // ranks
    leaf = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    # Function bodies look these up when they are called.
    spies = {name: mock.patch.object(dist, name, wraps=getattr(dist, name)).start() for name in COLLECTIVES}
    stats = token_stats(leaf * 1, targets, log_z_rows=rows, tp_group=group, **case.settings)
    forward = {name: [call.args for call in spy.call_args_list] for name, spy in spies.items()}
    weights = weights.to(stats.log_probs.dtype)
    finite_log_z = torch.where(stats.log_z == -torch.inf, 0, stats.log_z)
    loss = (weights[0] * stats.log_probs + weights[1] * finite_log_z).sum()
    if case.settings.get("entropy") == "grad":
        assert stats.entropy is not None
        loss = loss + (weights[2] * stats.entropy).sum()
    if stats.filter_entropy is not None:
        loss = loss + (weights[2] * stats.filter_entropy).sum()
    loss.backward()
    mock.patch.stopall()
    assert leaf.grad is not None
    saved = {name: getattr(stats, name) for name in (*FLOATS, "in_filter")}
    # all_gather(parts, local): the parts that this rank sends.
    sent = [part.numel() for _, part in forward.pop("all_gather")]
    others = sum(len(calls) for calls in forward.values())
    backward = sum(spy.call_count for spy in spies.values()) - len(sent) - others
    calls = {"sent": torch.tensor(sent), "others": torch.tensor(others), "backward": torch.tensor(backward)}
    return {name: value.detach() for name, value in saved.items() if value is not None} | {"grad": leaf.grad} | calls


def refusal(group: dist.ProcessGroup, rank: int) -> str:
    """Returns the error of a rank if the logits of another rank hold a NaN."""
    logits = torch.zeros(3, 4)
    if rank == 1:
        logits[2, 0] = torch.nan
    try:
        token_stats(logits, torch.tensor([0, 1, 2]), tp_group=group)
    except ValueError as error:
        return str(error)
    return "accepted"


def work(rank: int) -> Results:
    results: Results = {}
    for ranks, group, place in split(rank, SPLITS):
        for name, case in CASES.items():
            results[ranks, name] = run(case, group, place, ranks)
        results[ranks, "refusal"] = refusal(group, place)
    return results


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_the_same_bits(by_rank: list[Results], name: str, ranks: int) -> None:
    first = by_rank[0][ranks, name]
    for rank in range(1, RANKS):
        for statistic, value in by_rank[rank][ranks, name].items():
            if statistic in (*FLOATS, "in_filter"):
                assert torch.equal(value, first[statistic]), f"{statistic} on rank {rank}"


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_split_does_not_change_the_results(by_rank: list[Results], name: str, ranks: int) -> None:
    case = CASES[name]
    want = run(case, None, 0, 1)
    got = by_rank[0][ranks, name]
    got["grad"] = torch.cat([by_rank[rank][ranks, name]["grad"] for rank in range(ranks)], 1)
    assert got.keys() == want.keys()
    assert want["sent"].numel() == 0
    assert torch.equal(got["in_filter"], want["in_filter"])
    for statistic in (*FLOATS, "grad"):
        if statistic in want:
            rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}[want[statistic].dtype]
            torch.testing.assert_close(got[statistic], want[statistic], rtol=10 * rounding, atol=rounding)
    vocab = case.settings.get("vocab_size", case.columns)
    assert (got["grad"][:, vocab:] == 0).all()


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_only_collectives_are_two_small_gathers_in_the_forward(
    by_rank: list[Results], name: str, ranks: int
) -> None:
    """A rank sends four numbers per token, and two more per token that needs log Z, for any size of the vocabulary. A
    top-k or top-p filter adds the likeliest logits, and the entropy inside the filter two numbers."""
    _, _, rows, _ = inputs(CASES[name])
    wanted = TOKENS if rows is None else int(rows.sum())
    for results in by_rank:
        seen = results[ranks, name]
        asked = CASES[name].settings
        likeliest = Filter(top_k=asked.get("top_k"), top_p=asked.get("top_p")).likeliest
        masses = 4 if asked.get("filter_entropy") else 2
        assert seen["sent"].tolist() == [(4 + likeliest) * TOKENS, masses * wanted]
        assert int(seen["others"]) == int(seen["backward"]) == 0


@pytest.mark.parametrize("ranks", SPLITS)
def test_a_nan_on_one_rank_is_refused_on_all(by_rank: list[Results], ranks: int) -> None:
    for results in by_rank:
        assert "1 of 3 rows" in results[ranks, "refusal"] and "[2]" in results[ranks, "refusal"]
