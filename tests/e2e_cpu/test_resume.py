"""A run that was stopped goes on as if it had not been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine, Finished

pytestmark = pytest.mark.e2e

SHORT = (
    *SHORT_WARM_START,
    "evaluation.suites={}",
    "evaluation.probes={}",
    "algorithm.proxy_refresh_steps=3",
    "train.save_every=2",
    "rollout.engines=1",
)


def learning_curve(run: Finished) -> list[dict[str, float]]:
    """Every metric but those of time."""
    return [
        {name: value for name, value in row.items() if name != "time" and not name.startswith(("perf/", "memory/"))}
        for row in run.metrics
    ]


@pytest.fixture(scope="module")
def straight(quickstart: Callable[..., Finished]) -> Finished:
    return quickstart("straight", *SHORT, "train.steps=6")


def test_ctrl_c_leaves_a_checkpoint_and_resume_continues_exactly(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    process = command_line.start("train", str(QUICKSTART), "run.name=stopped", *SHORT, "train.steps=6")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step=1/"):
            os.kill(process.pid, signal.SIGINT)
            break
    stopped = command_line.finish(process, "stopped")
    assert stopped.status == 0, "".join(lines) + stopped.output
    assert "resume=auto" in stopped.output
    last = stopped.metrics[-1]["step"]
    assert last < 6
    assert (stopped.folder / f"checkpoints/step_{last:06d}/manifest.json").is_file()

    resumed = quickstart("stopped", *SHORT, "train.steps=6", "resume=auto")
    assert learning_curve(resumed) == learning_curve(straight)


def test_a_run_killed_outright_resumes_from_its_last_checkpoint(
    straight: Finished, command_line: CommandLine, quickstart: Callable[..., Finished]
) -> None:
    process = command_line.start("train", str(QUICKSTART), "run.name=killed", *SHORT, "train.steps=6")
    assert process.stdout is not None
    for line in process.stdout:
        if "step_000004" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    command_line.finish(process, "killed")
    resumed = quickstart("killed", *SHORT, "train.steps=6", "resume=auto")
    assert learning_curve(resumed) == learning_curve(straight)
    straight_weights = (straight.folder / "hf/model.safetensors").read_bytes()
    assert (resumed.folder / "hf/model.safetensors").read_bytes() == straight_weights
