"""A rank hangs: the run names the rank, writes the stacks of all processes, and ends without leaving any process."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_rl.utils.heartbeat import read_beats
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]


def test_a_hanging_rank_is_named_and_the_run_ends(command_line: CommandLine) -> None:
    process = command_line.start(
        "train",
        str(QUICKSTART),
        "run.name=hang",
        *SHORT_WARM_START,
        "evaluation.suites={}",
        "evaluation.probes={}",
        "rollout.engines=1",
        "observability.hang_seconds=30",
    )
    folder = command_line.folder / "runs/hang"
    assert process.stdout is not None
    beats: dict[str, int] = {}
    for line in process.stdout:
        if line.startswith("step=1/"):
            beats = {beat.process: beat.pid for beat in read_beats(folder / "logs/heartbeats")}
            os.kill(beats["actor-rank-1"], signal.SIGSTOP)
            break
    assert set(beats) == {"actor-rank-0", "actor-rank-1", "engine-0"}
    hung = command_line.finish(process, "hang")
    assert hung.status == 2, hung.output
    assert "actor-rank-0 waits for actor-rank-1 (stopped)." in hung.output
    assert "Traceback" not in hung.output
    stacks = {path.stem: path.read_text() for path in (folder / "logs/stacks").iterdir()}
    assert set(stacks) == set(beats)
    assert "all_reduce" in stacks["actor-rank-0"]
