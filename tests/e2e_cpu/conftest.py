"""Whole runs through the command line: real Ray, real Megatron ranks, a real engine, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.data.countdown import write_task
from megatron_rl.observability.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples/quickstart/countdown.yaml"
MARK = "MEGATRON_RL_TEST_RUN"
"""An environment variable that every process of a run inherits, by which the ones left behind are found."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    status: int
    output: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)


class CommandLine:
    """`megatron-rl` in a folder of its own, as a user's shell would run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_rl.cli", *arguments],
            cwd=self.folder,
            env=os.environ | {MARK: self.mark, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def train(self, name: str, *overrides: str, config: Path = QUICKSTART) -> Finished:
        process = self.start("train", str(config), f"run.name={name}", *overrides)
        return self.finish(process, name)

    def finish(self, process: subprocess.Popen[str], name: str) -> Finished:
        """Wait for the end. No process of the run may outlive it by more than a few seconds."""
        try:
            output, _ = process.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        deadline = time.monotonic() + 10
        while self.left_behind() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not self.left_behind()
        return Finished(self.folder / "runs" / name, process.returncode, output)

    def left_behind(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """With the Countdown task written where the quickstart's configuration looks for it."""
    folder = tmp_path_factory.mktemp("e2e")
    write_task(folder / "runs/countdown-task")
    return CommandLine(folder)


SHORT_WARM_START = (
    "warm_start.batch_size=64",
    "warm_start.phases.0.steps=500",
    "warm_start.phases.1.steps=80",
    "evaluation.suites={held_out: runs/countdown-task/held_out.jsonl}",
)
"""Enough for a policy that is right now and then; every test shares its cached result."""


@pytest.fixture(scope="session")
def quickstart(command_line: CommandLine) -> Callable[..., Finished]:
    """The quickstart under overrides, after a shorter warm start."""

    def run(name: str, *overrides: str) -> Finished:
        finished = command_line.train(name, *SHORT_WARM_START, *overrides)
        assert finished.status == 0, finished.output[-5000:]
        return finished

    return run


def values(finished: Finished, metric: str) -> list[float]:
    """The metric's value at each step that has one."""
    return [row[metric] for row in finished.metrics if row.get(metric) is not None]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
