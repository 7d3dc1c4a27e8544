"""Four data-parallel ranks under TRL make the update that one rank makes of all rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lpreg import PolicyLoss, make_loss
from tests.invariance.ranks import RANKS, Results, run_ranks
from tests.tiers import chosen, quick_of
from tests.trl_runs import EQUALLY_LONG, run

LOSSES: dict[str, PolicyLoss] = {
    "lp_reg": make_loss("lp_reg", rho=0.4, min_p=0.1),
    "lagged": make_loss("lp_reg", rho=0.4, min_p=0.1, proxy_source="lagged"),
    "random": make_loss("lp_reg", rho=0.4, min_p=0.1, select_by="random"),
    "gspo": make_loss("gspo"),
    "kl_cov": make_loss("kl_cov", share=0.3),
    "clip_cov": make_loss("clip_cov", share=0.1, cov_low=0.0, cov_high=1.0),
    "high_entropy": make_loss("high_entropy", share=0.4),
    "grpo, maxrl": make_loss("grpo"),
}


def gradients(name: str, folder: Path, **layout: int) -> list[dict[str, torch.Tensor]]:
    advantage = "maxrl" if "maxrl" in name else None
    seen = run(LOSSES[name], folder / name, prompts=EQUALLY_LONG, advantage=advantage, **layout)
    return [update.gradient for update in seen.updates]


def work(rank: int, folder: Path, names: list[str]) -> Results:
    from accelerate import PartialState

    # As a launcher sets it. The processes are already joined, so the address is never used.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    PartialState(cpu=True)
    return {name: gradients(name, folder, per_device_train_batch_size=3) for name in names}


@pytest.fixture(scope="module")
def on_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("trl")
    return run_ranks(work, folder, folder, sorted(chosen(request, "name")))


@pytest.mark.parametrize("name", quick_of(LOSSES, ("lp_reg", "lagged", "gspo", "clip_cov", "grpo, maxrl")))
def test_four_ranks_make_the_update_of_one_rank(name: str, on_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = gradients(name, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    for updates in (results[name] for results in on_ranks):
        assert len(updates) == len(alone) == 2
        for got, want in zip(updates, alone, strict=True):
            for parameter in want:
                torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-7, atol=1e-10)
