"""Exact selection does not depend on how the tokens lie over ranks: one, two or four processes all equal a sort.

Nor does any rule of `apply_rule`: each selects what it selects on one process.

The tests start four ranks once and compare what these return.
"""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lpreg import Selection, SelectionRule, apply_rule, select_highest, select_lowest
from lpreg.selection import SelectionKind
from tests.invariance.ranks import RANKS, Results, run_ranks, split

SPLITS = (1, 2, 4)
QUESTIONS = (("lowest", 0.01), ("lowest", 0.3), ("highest", 0.05))
# Positions at which the tokens are cut between four ranks; two ranks use the middle cut.
SHARES = {"even": (0.25, 0.5, 0.75), "one rank holds all": (0.0, 1.0, 1.0), "uneven": (0.6, 0.6, 0.61)}
SELECTORS = {"lowest": select_lowest, "highest": select_highest}


def populations() -> dict[str, tuple[Tensor, Tensor]]:
    """Values, and which of them are eligible, over all ranks."""
    generator = torch.Generator().manual_seed(0)
    heavy_tail = -(torch.randn(3001, generator=generator).abs() ** 3)
    ties = -torch.randint(0, 7, (500,), generator=generator).float()
    zeros = torch.where(torch.rand(100, generator=generator) < 0.5, 0.0, -0.0)
    holes = torch.where(torch.rand(400, generator=generator) < 0.1, -math.inf, heavy_tail[:400])
    return {
        "heavy tail": (heavy_tail, torch.rand(3001, generator=generator) < 0.8),
        "fp64": (heavy_tail.double() * (1 + 1e-10), torch.ones(3001, dtype=torch.bool)),
        "ties": (ties, torch.ones(500, dtype=torch.bool)),
        "signed zeros": (zeros, torch.ones(100, dtype=torch.bool)),
        "minus infinity": (holes, torch.rand(400, generator=generator) < 0.5),
        "none eligible": (ties, torch.zeros(500, dtype=torch.bool)),
        "nothing": (torch.zeros(0), torch.zeros(0, dtype=torch.bool)),
    }


def places(count: int, shares: str, ranks: int) -> list[Tensor]:
    """Which tokens each rank holds: a shuffle, cut into `ranks` parts."""
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(len(shares) + ranks))
    cuts = {1: (), 2: SHARES[shares][1:2], 4: SHARES[shares]}[ranks]
    return list(shuffle.tensor_split([int(cut * count) for cut in cuts]))


RULES = {
    kind: SelectionRule(kind=kind, fraction=0.03, covariance_range=(0.2, 2.0), probability=0.9)
    for kind in get_args(SelectionKind)
}


def response_tokens() -> dict[str, Tensor]:
    """Every input that a rule may need, over all ranks. 200 tokens tie for the highest covariance."""
    generator = torch.Generator().manual_seed(2)
    certain = torch.arange(2000) < 200
    return {
        "eligible": torch.rand(2000, generator=generator) < 0.9,
        "log_probs": torch.where(certain, 0.0, -(torch.randn(2000, generator=generator) ** 2)),
        "entropy": torch.rand(2000, generator=generator),
        "advantages": torch.where(certain, 4.0, torch.randn(2000, generator=generator)),
        "token_ids": torch.arange(2000),
    }


def all_cases() -> list[tuple[str, str, str, float]]:
    """(population, shares, selector, fraction)."""
    return [(name, shares, *question) for name in populations() for shares in SHARES for question in QUESTIONS]


def refusal(group: dist.ProcessGroup, rank: int) -> str:
    values = torch.full((3,), math.nan if rank == 1 else 0.0)
    try:
        select_lowest(values, torch.ones(3, dtype=torch.bool), 0.5, group=group)
    except ValueError as error:
        return str(error)
    return "accepted"


def work(rank: int) -> Results:
    results: Results = {}
    everything = populations()
    for ranks, group, place in split(rank, SPLITS):
        for case in all_cases():
            name, shares, selector, fraction = case
            values, eligible = everything[name]
            mine = places(len(values), shares, ranks)[place]
            got = SELECTORS[selector](values[mine], eligible[mine], fraction, group=group)
            results[ranks, case] = (got.threshold, got.mask, got.count, got.population)
        for (kind, rule), shares in itertools.product(RULES.items(), SHARES):
            mine = places(2000, shares, ranks)[place]
            part = {name: value[mine] for name, value in response_tokens().items()}
            got = apply_rule(rule, **part, seed=9, group=group)
            results[ranks, kind, shares] = (got.threshold, got.mask, got.count, got.population)
        if ranks > 1:
            results[ranks, "refusal"] = refusal(group, place)
    return results


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(work, tmp_path_factory.mktemp("ranks"))


def sorted_out(values: Tensor, eligible: Tensor, fraction: float, selector: str) -> Selection:
    """Selects by the definition."""
    ranked = values[eligible].sort(descending=selector == "highest").values
    if len(ranked) == 0:
        return Selection(math.inf if selector == "highest" else -math.inf, torch.zeros_like(eligible), 0, 0)
    threshold = ranked[max(1, int(fraction * len(ranked))) - 1]
    mask = eligible & ((values >= threshold) if selector == "highest" else (values <= threshold))
    return Selection(float(threshold), mask, int(mask.sum()), len(ranked))


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("name", populations())
def test_every_layout_equals_a_sort(by_rank: list[Results], name: str, ranks: int) -> None:
    values, eligible = populations()[name]
    for case in (case for case in all_cases() if case[0] == name):
        _, shares, selector, fraction = case
        want = sorted_out(values, eligible, fraction, selector)
        parts = places(len(values), shares, ranks)
        assert len(parts) == ranks
        for rank in range(RANKS):
            threshold, mask, count, population = by_rank[rank][ranks, case]
            assert (threshold, count, population) == (want.threshold, want.count, want.population), case
            assert torch.equal(mask, want.mask[parts[rank % ranks]]), case


@pytest.mark.parametrize("ranks", SPLITS)
@pytest.mark.parametrize("kind", RULES)
def test_every_layout_selects_what_one_process_selects(by_rank: list[Results], kind: str, ranks: int) -> None:
    want = apply_rule(RULES[kind], **response_tokens(), seed=9)
    assert 0 < (want.population - want.count if kind == "not_spurious" else want.count) < 0.05 * want.population
    for rank, shares in itertools.product(range(RANKS), SHARES):
        threshold, mask, count, population = by_rank[rank][ranks, kind, shares]
        assert (threshold, count, population) == (want.threshold, want.count, want.population)
        assert torch.equal(mask, want.mask[places(2000, shares, ranks)[rank % ranks]])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_nan_on_one_rank_is_refused_on_all(by_rank: list[Results], ranks: int) -> None:
    for rank, results in enumerate(by_rank):
        where = "the first on this rank at [0, 1, 2]" if rank % ranks == 1 else "none of them on this rank"
        assert results[ranks, "refusal"].startswith("values: 3 eligible tokens are NaN, " + where)
