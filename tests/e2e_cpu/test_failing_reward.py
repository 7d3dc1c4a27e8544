"""A run whose verifier fails on some samples: they have no reward anywhere, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e_cpu.conftest import SHORT_WARM_START, CommandLine, Finished
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

FLAKY = """
from megatron_rl.reward.countdown import verify_countdown

def score(sample):
    if sample.response.token_ids.sum() % 5 == 0 and "The answer is" not in sample.text:
        raise RuntimeError("the verifier is out of order")
    return verify_countdown(sample)
"""
OVERRIDES = (
    *SHORT_WARM_START,
    "reward.name=flaky_reward:score",
    "evaluation.probes={}",
    "train.steps=2",
    "train.updates_per_rollout=2",
    "observability.rollouts_every=1",
    "rollout.engines=1",
    "actor.tensor_parallel=1",
)


def test_failed_samples_have_no_reward(command_line: CommandLine, quickstart: Callable[..., Finished]) -> None:
    (command_line.folder / "flaky_reward.py").write_text(FLAKY)
    run = quickstart("flaky", *OVERRIDES, "reward.max_failed_fraction=0.5")
    for row in run.metrics[1:]:
        assert 0 < row["reward/error_fraction"] < 0.5
        assert 0.5 < row["train/counted_fraction"] < 1
        dump = pq.read_table(run.folder / f"rollouts/step_{row['step']:06d}.parquet").to_pylist()
        failed = [sample for sample in dump if sample["outcome"] != "score"]
        assert failed and all(sample["reward"] is None and sample["advantage"] == 0 for sample in failed)
        assert all("out of order" in sample["detail"] for sample in failed)
        rewards = [sample["reward"] for sample in dump if sample["reward"] is not None]
        assert row["reward/mean"] == pytest.approx(np.mean(rewards))
    failing = [name for name in run.metrics[0] if name.endswith("failed_fraction")]
    assert failing and all(0 < run.metrics[0][name] < 0.5 for name in failing)


def test_too_many_failures_end_the_run_with_examples(command_line: CommandLine) -> None:
    (command_line.folder / "flaky_reward.py").write_text(FLAKY)
    run = command_line.train("too_flaky", *OVERRIDES, "evaluation.suites={}", "reward.max_failed_fraction=0.01")
    assert run.status == 2 and "Traceback" not in run.output
    assert "and have no reward; reward.max_failed_fraction is 0.01" in run.output
    assert "RuntimeError: the verifier is out of order (flaky_reward.py, line 6)" in run.output
