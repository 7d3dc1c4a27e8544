"""Complete runs through the command line, with real Ray, Megatron ranks, engines and files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.data.countdown import write_task
from megatron_rl.observability.metrics import read_metrics
from tests.patience import Patience, output_of, start

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples/quickstart/countdown.yaml"
RAY_FOLDER = Path("/tmp") / f"mrl-ray-{os.getuid()}"
"""Folder of this user's Rays, with their token."""
STEPS = 40
"""Steps of `learned`."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that outlive a killed driver, or a Ray that lost patience with its parts on a busy machine. They
try for 60 s, a constant of Ray, to report what is gone."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    status: int
    output: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)


class Descendants(threading.Thread):
    """Records every process that a run starts, while the run is alive. Later they could not be found: processes that
    Ray starts hide their title and environment, and lose their parent when it is killed."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.seen: set[psutil.Process] = set()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.root)
            while root.status() != psutil.STATUS_ZOMBIE:
                self.seen.update(root.children(recursive=True))
                time.sleep(0.25)

    def alive(self) -> dict[int, str]:
        """Returns the titles of the processes that have not ended, by process id."""
        return {
            process.pid: title for process in {*self.seen, *psutil.process_iter()} if (title := self._title(process))
        }

    def wait_for_end(self, *, of_agents: bool) -> None:
        """Blocks until all have ended, those of AGENTS only on request. They may take their time as long as they become
        fewer or work at their end."""
        self._wait(AGENTS, window=30.0)
        if of_agents:
            self._wait((), window=90.0)

    def _wait(self, lingering: tuple[str, ...], window: float) -> None:
        """lingering: beginnings of the titles of processes that may go on."""

        def left() -> list[int]:
            return [pid for pid, title in self.alive().items() if not title.startswith(lingering)]

        count = 0
        patience = Patience(left, "processes that outlive their run", window=window, ceiling=60.0)
        while pids := left():
            if len(pids) != count:
                count = len(pids)
                patience = Patience(left, "processes that outlive their run", window=window, ceiling=60.0)
            patience.check()
            time.sleep(0.2)

    def _title(self, process: psutil.Process) -> str:
        """Returns the process's command line; "" if it has ended or is not of this run.

        Ray names the folder of its session after the driver.
        """
        try:
            title = " ".join(process.cmdline()).strip()
            ours = process in self.seen or ("/session_" in title and f"_{self.root}/" in title)
            return title if ours and process.is_running() and process.status() != psutil.STATUS_ZOMBIE else ""
        except psutil.Error:
            return ""


class CommandLine:
    """Runs `megatron-rl` in a folder of its own, as from a user's shell."""

    def __init__(self, folder: Path, program: str = "megatron_rl.cli") -> None:
        self.folder, self.program = folder, program
        self.started: dict[int, Descendants] = {}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", self.program, *arguments]
        process = start(command, self.folder, PYTHONPATH=str(REPOSITORY))
        self.started[process.pid] = Descendants(process.pid)
        return process

    def train(self, name: str, *overrides: str, config: Path = QUICKSTART) -> Finished:
        process = self.start("train", str(config), f"run.name={name}", *overrides)
        return self.finish(process, name)

    def evaluate(self, *arguments: str) -> str:
        """Runs `megatron-rl eval`, which must succeed, and returns its output."""
        finished = self.finish(self.start("eval", *arguments), "eval")
        assert finished.status == 0, finished.output[-3000:]
        return finished.output

    def finish(self, process: subprocess.Popen[str], name: str) -> Finished:
        """Waits for the end of a run. No process of the run may outlive it by more than a few seconds."""
        output = output_of(process, name)
        descendants = self.started.pop(process.pid)
        descendants.join()
        descendants.wait_for_end(of_agents=process.returncode != -signal.SIGKILL)
        return Finished(self.folder / "runs" / name, process.returncode, output)


@pytest.fixture(scope="session")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A folder with the Countdown task at the paths of the quickstart's configuration."""
    folder = tmp_path_factory.mktemp("e2e")
    write_task(folder / "runs/countdown-task")
    return CommandLine(folder)


SUITES = """
max_response_tokens: 46
samples_per_prompt: 4
temperature: 1.0
reward: {name: countdown}
suites:
  held_out: held_out.jsonl
  greedy: {data: held_out.jsonl, temperature: 0.0, samples_per_prompt: 1}
"""


@pytest.fixture(scope="session")
def suites(command_line: CommandLine) -> list[str]:
    """Arguments of `megatron-rl eval` for two suites of the Countdown task."""
    (command_line.folder / "suites.yaml").write_text(SUITES)
    return ["--suites", "suites.yaml", "--data", "runs/countdown-task"]


SHORT_WARM_START = (
    "warm_start.batch_size=64",
    "warm_start.phases.0.steps=500",
    "warm_start.phases.1.steps=80",
    "evaluation.suites={held_out: runs/countdown-task/held_out.jsonl}",
)
"""Enough for a policy that sometimes succeeds. All tests share its cached result."""


@pytest.fixture(scope="session")
def quickstart(command_line: CommandLine) -> Callable[..., Finished]:
    """Runs the quickstart with overrides, after a shorter warm start."""

    def run(name: str, *overrides: str) -> Finished:
        finished = command_line.train(name, *SHORT_WARM_START, *overrides)
        assert finished.status == 0, finished.output[-5000:]
        return finished

    return run


@pytest.fixture(scope="session")
def learned(quickstart: Callable[..., Finished]) -> Finished:
    """The one complete run of `make test`: TP 2, two engines, evaluation, checkpoints, a profile, export and report."""
    return quickstart(
        "learned", f"train.steps={STEPS}", "evaluation.every=20", "train.save_every=20", "observability.profile=[2]"
    )


def values(finished: Finished, metric: str) -> list[float]:
    """Returns the metric's value at each step that has one."""
    return [row[metric] for row in finished.metrics if row.get(metric) is not None]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def files_with_token(folder: Path) -> list[Path]:
    """Returns the files below a folder that have the token of Ray in them. The folder must not be empty."""
    token = (RAY_FOLDER / "token").read_bytes()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert token and files
    return [path for path in files if token in path.read_bytes()]
