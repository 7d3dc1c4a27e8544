"""Gradients whose sum over replicas overlaps the backward pass are those of a sum after it, also on an idle replica.

The fused head adds the gradient of its weight by hand, which DDP does not see: the head tells it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.actor.optimizer.state import read_state
from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.models.weight_map import export_hf_weights
from megatron_rl.parallel.layout import Layout
from tests import ranks
from tests.hf_models import write_hf_model
from tests.meeting import meeting_point
from tests.unit.plan.measure import rows

SETTINGS = {"device": "cpu", "micro_batch_tokens": 16, "rows": "packed"}
BATCHES = (6, 1, 6)
"""Sequences of each step; in the second step one of the replicas has nothing to do."""


def steps(rank: int, folder: Path, overlap: bool, head: str) -> dict[str, Any]:
    worker = MegatronWorker(
        ActorSettings.model_validate(SETTINGS | {"overlap_grad_reduce": overlap, "lm_head": head, "data_parallel": 2}),
        Layout(data=2),
        rank,
    )
    worker.start(*meeting_point(worker, folder / f"{overlap}-{head}.port"), folder / "model")
    worker.load_hf(folder / "model")
    worker.build_optimizer(OptimizerSettings(eps=1.0))
    norms = []
    for count in BATCHES:
        batch = rows(count, prompt=3, response=5, vocabulary=50)
        worker.optimizer.zero_grad()
        worker.passes.gradients(batch, None, batch.num_sampled_tokens, 1.0)
        norms.append(worker.optimizer.step(1e-2))
    state, _ = read_state(worker.optimizer, worker.model)
    moments = dict(export_hf_weights(worker.model, worker.hf_config, state["exp_avg"]))
    worker.close()
    return {"norms": norms, **{name: moment.clone() for name, moment in moments.items()}}


def run_rank(rank: int, folder: Path) -> dict[tuple[bool, str], dict[str, Any]]:
    return {(o, head): steps(rank, folder, o, head) for head in ("fused", "materialised") for o in (False, True)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("overlap")
    write_hf_model(folder / "model", noise=0.1)
    return ranks.run_ranks(run_rank, 2, folder)[0]


@pytest.mark.parametrize("head", ["fused", "materialised"])
def test_an_overlapped_sum_gives_the_same_gradients(found: dict[tuple[bool, str], dict[str, Any]], head: str) -> None:
    after, during = found[False, head], found[True, head]
    assert during.pop("norms") == pytest.approx(after.pop("norms"), rel=1e-6)
    torch.testing.assert_close(during, after, atol=1e-7, rtol=1e-6)
