"""A stopped or killed run resumes as if it had not been stopped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.checkpoint.manifest import read_manifest
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine, Finished, files_with_token
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

SHORT = (
    *SHORT_WARM_START,
    "evaluation.suites={}",
    "evaluation.probes={}",
    "algorithm.proxy_refresh_steps=3",
    "train.steps=6",
    "train.save_every=2",
    "rollout.engines=1",
)
OFF_POLICY = (
    "train.updates_per_rollout=2",
    "algorithm.preset=paper",
    "algorithm.proxy_source=old",
    "algorithm.lp_reg.kl_estimator=full",
    "rollout.dynamic_sampling=true",
    "algorithm.reference_kl.coefficient=0.01",
    "actor.dtype=bfloat16",
    "actor.tensor_parallel=1",
    "actor.data_parallel=2",
    "train.async_save=false",
    "train.steps=4",
)


def learning_curve(run: Finished) -> list[dict[str, float]]:
    """Returns all metrics but those of the machine, and of the contract, which is checked at every start."""
    other = ("time", "perf/", "memory/", "logprob/contract")
    return [{name: value for name, value in row.items() if not name.startswith(other)} for row in run.metrics]


def interrupt(command_line: CommandLine, name: str, at: str, how: signal.Signals, *overrides: str) -> Finished:
    """Starts a run, and sends it a signal once `at` appears in its output."""
    process = command_line.start("train", str(QUICKSTART), f"run.name={name}", *SHORT, *overrides)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if at in line:
            os.kill(process.pid, how)
            break
    finished = command_line.finish(process, name)
    return Finished(finished.folder, finished.status, "".join(lines) + finished.output)


def assert_same_end(run: Finished, other: Finished) -> None:
    assert learning_curve(run) == learning_curve(other)
    model = Path("hf/model.safetensors")
    assert (run.folder / model).read_bytes() == (other.folder / model).read_bytes()


@pytest.fixture(scope="module")
def straight(quickstart: Callable[..., Finished]) -> Finished:
    return quickstart("straight", *SHORT)


def test_a_run_that_was_interrupted_and_then_killed_ends_like_an_uninterrupted_one(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    stopped = interrupt(command_line, "interrupted", "step=1/", signal.SIGINT)
    assert stopped.status == 0, stopped.output
    assert "resume=auto" in stopped.output
    step = stopped.metrics[-1]["step"]
    assert step < 4
    assert (stopped.folder / f"checkpoints/step_{step:06d}/manifest.json").is_file()

    killed = interrupt(command_line, "interrupted", "step_000004", signal.SIGKILL, "resume=auto")
    assert killed.status == -signal.SIGKILL, killed.output

    resumed = quickstart("interrupted", *SHORT, "resume=auto")
    assert f"resumed from {Path('runs/interrupted/checkpoints/step_000004')} (step 4)" in resumed.output
    assert_same_end(resumed, straight)
    assert not files_with_token(resumed.folder)


def test_the_time_of_checkpoints_is_logged(straight: Finished) -> None:
    """The time that a step waits for its checkpoint is in the row of that step, the time in the background in a later
    row. The last step waits for its checkpoint."""
    rows = {row["step"]: row for row in straight.metrics}
    assert [step for step in rows if "perf/checkpoint_seconds" in rows[step]] == [2, 4, 6]
    beside = [step for step in rows if "perf/checkpoint_background_seconds" in rows[step]]
    assert len(beside) == 2 and beside[0] in (2, 3, 4) and beside[1] in (4, 5, 6)


def test_a_run_resumes_under_another_layout_up_to_rounding(
    straight: Finished, quickstart: Callable[..., Finished]
) -> None:
    checkpoint = straight.folder / "checkpoints/step_000004"
    moved = quickstart(
        "moved", *SHORT, "train.steps=5", "actor.tensor_parallel=1", "actor.pipeline_parallel=2", f"resume={checkpoint}"
    )
    assert "written under tensor 2, now pipeline 2: weights and optimizer state are exact" in moved.output
    first, last = moved.metrics  # the new folder begins with the step of the checkpoint
    assert first["step"] == 4
    expected = straight.metrics[5]
    assert last["step"] == expected["step"] == 5
    assert last["reward/mean"] == expected["reward/mean"]
    for metric in ("train/loss", "train/grad_norm", "entropy/token_mean"):
        assert last[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-6), metric


def test_an_off_policy_run_in_bf16_resumes_from_an_older_checkpoint_if_the_newest_is_damaged(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    """The run has two updates per rollout, the full KL against the policy that sampled, dynamic sampling, a reference
    model and the distributed optimizer."""
    overrides = (*SHORT, *OFF_POLICY, f"model.path={straight.folder / 'hf'}", "warm_start=null")
    uninterrupted = quickstart("off_policy", *overrides)
    again = uninterrupted.folder.with_name("off_policy_again")
    shutil.copytree(uninterrupted.folder, again, symlinks=True)
    name = next(iter(read_manifest(again / "checkpoints/step_000004").files))
    damaged = again / "checkpoints/step_000004" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])

    resumed = quickstart(again.name, *overrides, "resume=auto")
    assert (
        f"DAMAGED CHECKPOINT PASSED OVER: checkpoint file {damaged.relative_to(command_line.folder)}" in resumed.output
    )
    assert "step_000002 (step 2)" in resumed.output
    assert len(resumed.metrics) == 5
    assert_same_end(resumed, uninterrupted)


def test_another_training_file_is_refused_unless_allowed(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    checkpoint = straight.folder / "checkpoints/step_000004"
    rows = (command_line.folder / "runs/countdown-task/train.jsonl").read_text().splitlines(keepends=True)
    other = command_line.folder / "other.jsonl"
    other.write_text("".join(reversed(rows[: len(rows) // 2])))
    changed = (*SHORT, "train.steps=5", f"data.train={other}", f"resume={checkpoint}")

    refused = command_line.train("refused", *changed)
    assert refused.status == 2 and "data.allow_changed=true" in refused.output and "Traceback" not in refused.output
    assert not refused.folder.exists(), "nothing is written"

    allowed = quickstart("changed", *changed, "data.allow_changed=true")
    assert f"the run begins with the first prompt of {other}, another file than there" in allowed.output
    manifest = read_manifest(allowed.folder / "checkpoints/step_000005")
    assert manifest.origin.data is not None and manifest.origin.data.path == str(other)
    cursor, before = manifest.state.cursor, read_manifest(checkpoint).state.cursor
    assert (cursor["epoch"], cursor["size"]) == (0, len(rows) // 2)
    assert cursor["position"] == before["position"] / 4, "the prompts of one step"
