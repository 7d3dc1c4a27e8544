"""A killed `megatron-rl eval` is continued. `test_quickstart.py` evaluates a run, a checkpoint and an export."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.e2e_cpu.conftest import CommandLine
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]


def test_a_killed_evaluation_continues_with_the_same_result(command_line: CommandLine, suites: list[str]) -> None:
    arguments = ("runs/countdown-task/model", *suites, "--batch", "8")
    command_line.evaluate(*arguments, "--out", "complete")
    process = command_line.start("eval", *arguments, "--out", "killed")
    part = command_line.folder / "killed/held_out.parts/000008.parquet"
    while not part.exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert part.exists() and not (command_line.folder / "killed/greedy.parquet").exists()

    output = command_line.evaluate(*arguments, "--out", "killed")
    assert "held_out: 0 of 101" in output and "macro mean" in output
    for name in ("held_out.parquet", "greedy.parquet", "summary.json"):
        complete, killed = (command_line.folder / folder / name for folder in ("complete", "killed"))
        assert complete.read_bytes() == killed.read_bytes(), name
