"""Runs that train on tokens of older weights: they keep the bound on staleness, and lose no prompt after kill -9."""

from __future__ import annotations

import shutil
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_rl.checkpoint.manifest import read_manifest
from megatron_rl.checkpoint.rollout_buffer import BUFFER_FILE, read_buffer
from megatron_rl.rollout.dump import dumps
from megatron_rl.types import Prompt
from tests.e2e_cpu.conftest import CommandLine, Finished
from tests.e2e_cpu.test_resume import SHORT, assert_same_end, interrupt
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

STEPS, PROMPTS = 4, 16
STALE = (
    *SHORT,
    f"train.steps={STEPS}",
    "train.async_save=false",
    "actor.tensor_parallel=1",
    "rollout.max_staleness=1",
    "algorithm.correction.weights=truncated",
    "observability.rollouts_every=1",
)
PARTIAL = (*STALE, "rollout.over_sampling=1.75")
ASYNCHRONOUS = (*STALE, "rollout.asynchronous=true")


def rows_of_steps(run: Finished) -> dict[int, list[dict[str, Any]]]:
    columns = ["prompt_id", "weight_version", "weight_versions", "token_ids"]
    return {step: pq.read_table(path, columns=columns).to_pylist() for step, path in dumps(run.folder / "rollouts")}


def assert_within_bound(run: Finished) -> None:
    """Step s trains the policy after s - 1 updates, on tokens that are at most one version older."""
    steps = rows_of_steps(run)
    assert list(steps) == list(range(1, STEPS + 1))
    for step, rows in steps.items():
        versions = {version for row in rows for version in row["weight_versions"]}
        assert versions <= {step - 2, step - 1} - {-1}, step
        assert all(len(row["weight_versions"]) == len(row["token_ids"]) for row in rows)
    ids = [row["prompt_id"] for rows in steps.values() for row in rows[::8]]
    assert len(ids) == len(set(ids)) == STEPS * PROMPTS
    losses = [row["train/loss"] for row in run.metrics if row["step"] > 0]
    assert len(losses) == STEPS and all(row.get("train/updates") == 1 for row in run.metrics if row["step"] > 0)


def test_partial_rollouts_resume_from_a_checkpoint_bit_for_bit(quickstart: Callable[..., Finished]) -> None:
    straight = quickstart("partial", *PARTIAL)
    assert_within_bound(straight)
    assert max(row.get("rollout/staleness_max", 0) for row in straight.metrics) == 1
    prompts: Any = defaultdict(lambda: Prompt("", (), "", None))
    left = read_buffer(straight.folder / "checkpoints/step_000002", prompts, lambda token_ids: "")
    assert any(group.complete for group in left) and any(not group.complete for group in left)

    again = straight.folder.with_name("partial_again")
    shutil.copytree(straight.folder, again, symlinks=True)
    shutil.rmtree(again / f"checkpoints/step_{STEPS:06d}")
    resumed = quickstart(again.name, *PARTIAL, "resume=auto")
    assert "(step 2)" in resumed.output
    assert_same_end(resumed, straight)


def test_an_asynchronous_run_loses_no_prompt_when_it_is_killed(
    command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    """The prompts that engines were working on are sampled again, so the metrics differ from those of an uninterrupted
    run."""
    killed = interrupt(command_line, "asynchronous", "step_000002", signal.SIGKILL, *ASYNCHRONOUS)
    assert killed.status == -signal.SIGKILL, killed.output
    checkpoint = killed.folder / "checkpoints/step_000002"
    assert (checkpoint / BUFFER_FILE).is_file()
    resumed = quickstart("asynchronous", *ASYNCHRONOUS, "resume=auto")
    assert_within_bound(resumed)
    cursor = read_manifest(resumed.folder / f"checkpoints/step_{STEPS:06d}").state.cursor
    assert cursor["epoch"] == 0 and cursor["position"] == STEPS * PROMPTS
    assert Path(resumed.folder / "hf/model.safetensors").is_file()
