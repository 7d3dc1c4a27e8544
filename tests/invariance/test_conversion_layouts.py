"""Weights survive loading into Megatron and export, under TP and PP of 1 to 4 each, whichever side reads or writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.actor import platform
from tests import ranks
from tests.invariance.conversion_worker import CASES, LAYOUTS, SAVED, Differences, Model, prepare, run_rank
from tests.tiers import chosen, quick_of

QUICK = ("tp1-pp1", "tp2-pp2", "tp3-pp1", "tp1-pp3", "tp4-pp1")


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Differences]:
    """Returns what each rank found. All layouts share one start of the processes."""
    folder = tmp_path_factory.mktemp("conversion")
    names = [name for name in LAYOUTS if name in chosen(request, "layout")]
    (models,) = ranks.run_ranks(prepare_all, 1, folder / "ours")
    count = max(tensor * pipeline for tensor, pipeline in (LAYOUTS[name] for name in names))
    return ranks.run_ranks(run_rank, count, models, names, folder)


def prepare_all(rank: int, folder: Path) -> dict[str, Model]:
    platform.prepare("cpu")
    return {case: prepare(case, folder) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", quick_of(LAYOUTS, QUICK))
def test_weights_are_unchanged_in_both_directions(differences: list[Differences], layout: str, case: str) -> None:
    """In: Megatron reads this project's checkpoint. Out: the export, and what Megatron saves and this project reads."""
    tensor, pipeline = LAYOUTS[layout]
    ranks_of_layout = [rank[layout][case] for rank in differences if layout in rank]
    assert len(ranks_of_layout) == tensor * pipeline
    ways = {"export", "published", "Megatron reads ours"}
    if layout in SAVED:
        ways |= {"we read Megatron's, stacked", "we read Megatron's, by layer"}
    for rank in ranks_of_layout:
        assert rank == dict.fromkeys(ways, 0.0)
