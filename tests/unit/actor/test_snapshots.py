"""A snapshot keeps its weights while training continues, and is in use for one pass only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rl.actor.worker import MegatronWorker
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.config.actor import ActorSettings, OptimizerSettings
from megatron_rl.parallel.layout import Layout
from tests.hf_models import write_hf_model
from tests.unit.plan.measure import rows

BATCH = rows(4, prompt=3, response=5, vocabulary=50)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[MegatronWorker]:
    model = write_hf_model(tmp_path / "model", noise=0.1)
    worker = MegatronWorker(ActorSettings(device="cpu"), Layout(), 0)
    worker.start("127.0.0.1", worker.open_port("127.0.0.1"), model)
    worker.load_hf(model)
    worker.build_optimizer(OptimizerSettings())
    yield worker
    worker.close()


def log_probs(worker: MegatronWorker, weights: str = "current", batch: SequenceBatch = BATCH) -> np.ndarray:
    table = worker.score(batch, 1.0, weights)
    assert table is not None and sorted(table.rows.tolist()) == [0, 1, 2, 3]
    return table.values["log_probs"]


def test_a_snapshot_does_not_change_while_training_continues(worker: MegatronWorker) -> None:
    before = log_probs(worker)
    worker.snapshot("lagged")
    worker.train(BATCH, 0.1, BATCH.num_sampled_tokens, 1.0)
    after = log_probs(worker)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_array_equal(log_probs(worker, "lagged"), before)
    np.testing.assert_array_equal(log_probs(worker), after)


def test_a_newer_snapshot_takes_the_memory_of_the_older_one(worker: MegatronWorker) -> None:
    worker.snapshot("lagged")
    places = {name: tensor.data_ptr() for name, tensor in worker.snapshots.get("lagged").items()}
    worker.train(BATCH, 0.1, BATCH.num_sampled_tokens, 1.0)
    worker.snapshot("lagged")
    assert {name: tensor.data_ptr() for name, tensor in worker.snapshots.get("lagged").items()} == places
    np.testing.assert_array_equal(log_probs(worker, "lagged"), log_probs(worker))


def test_a_missing_snapshot_raises_an_error(worker: MegatronWorker) -> None:
    with pytest.raises(RuntimeError, match=r"no reference snapshot yet: call snapshot\('reference'\)"):
        worker.score(BATCH, 1.0, "reference")


def test_weights_that_are_not_finite_raise_an_error_after_the_pass(worker: MegatronWorker) -> None:
    with torch.no_grad():
        worker.passes.head.model.head_weight[3, 0] = torch.nan
    for work in (
        lambda: worker.score(BATCH, 1.0),
        lambda: worker.passes.gradients(BATCH, None, BATCH.num_sampled_tokens, 1.0),
    ):
        with pytest.raises(ValueError, match=r"logits of \d+ of \d+ rows hold NaN"):
            work()


def test_candidates_are_the_tokens_with_the_highest_logits(worker: MegatronWorker) -> None:
    wanted = np.arange(BATCH.num_sampled_tokens) % 2 == 0
    table, logits = worker.candidates(BATCH.with_values(wanted=wanted), 1.0, 3), worker.logits(BATCH)
    assert table is not None and logits is not None
    ids, likeliest = table.values["candidate_ids"], np.argsort(-logits.values["logits"], axis=1)[:, :3]
    marked = ids[:, 0] >= 0
    assert marked.sum() == wanted.sum()
    np.testing.assert_array_equal(ids[marked], likeliest[marked])
