"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.checkpoint.manifest import read_manifest
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine, Finished

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # several runs a test

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
    """Every metric but those of the machine, and of the contract, which is checked at every start."""
    other = ("time", "perf/", "memory/", "logprob/contract")
    return [{name: value for name, value in row.items() if not name.startswith(other)} for row in run.metrics]


def interrupt(command_line: CommandLine, name: str, at: str, how: signal.Signals, *overrides: str) -> Finished:
    """Start a run and send it a signal when it has said `at`."""
    process = command_line.start("train", str(QUICKSTART), f"run.name={name}", *SHORT, *overrides)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if at in line:
            os.kill(process.pid, how)
            break
    finished = command_line.finish(process, name)
    return Finished(finished.folder, finished.status, "".join(said) + finished.output)


def assert_same_end(run: Finished, other: Finished) -> None:
    assert learning_curve(run) == learning_curve(other)
    model = Path("hf/model.safetensors")
    assert (run.folder / model).read_bytes() == (other.folder / model).read_bytes()


@pytest.fixture(scope="module")
def straight(quickstart: Callable[..., Finished]) -> Finished:
    return quickstart("straight", *SHORT)


def test_stopped_and_then_killed_a_run_ends_as_if_it_had_not_been(
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


def test_a_checkpoint_says_what_it_took(straight: Finished) -> None:
    """The time a step waited is in its own row, the time beside training in a later one; the last step waits."""
    rows = {row["step"]: row for row in straight.metrics}
    assert [step for step in rows if "perf/checkpoint_seconds" in rows[step]] == [2, 4, 6]
    beside = [step for step in rows if "perf/checkpoint_background_seconds" in rows[step]]
    assert len(beside) == 2 and beside[0] in (2, 3, 4) and beside[1] in (4, 5, 6)


def test_under_another_layout_it_goes_on_to_rounding_and_says_so(
    straight: Finished, quickstart: Callable[..., Finished]
) -> None:
    checkpoint = straight.folder / "checkpoints/step_000004"
    moved = quickstart(
        "moved", *SHORT, "train.steps=5", "actor.tensor_parallel=1", "actor.pipeline_parallel=2", f"resume={checkpoint}"
    )
    assert "written under tensor 2, now pipeline 2: weights and optimizer state are exact" in moved.output
    first, last = moved.metrics  # a folder of its own, which begins with the step of the checkpoint
    assert first["step"] == 4
    expected = straight.metrics[5]
    assert last["step"] == expected["step"] == 5
    assert last["reward/mean"] == expected["reward/mean"]
    for metric in ("train/loss", "train/grad_norm", "entropy/token_mean"):
        assert last[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-6), metric


def test_off_policy_in_bf16_with_the_distributed_optimizer(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    """Two updates a rollout with the full KL against the policy that sampled, refilled batches, a reference model; the
    newest checkpoint is damaged on the way."""
    overrides = (*SHORT, *OFF_POLICY, f"model.path={straight.folder / 'hf'}", "warm_start=null")
    whole = quickstart("off_policy", *overrides)
    again = whole.folder.with_name("off_policy_again")
    shutil.copytree(whole.folder, again, symlinks=True)
    name = next(iter(read_manifest(again / "checkpoints/step_000004").files))
    damaged = again / "checkpoints/step_000004" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])

    resumed = quickstart(again.name, *overrides, "resume=auto")
    assert (
        f"DAMAGED CHECKPOINT PASSED OVER: checkpoint file {damaged.relative_to(command_line.folder)}" in resumed.output
    )
    assert "step_000002 (step 2)" in resumed.output
    assert len(resumed.metrics) == 5
    assert_same_end(resumed, whole)
