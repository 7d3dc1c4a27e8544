"""The processes of one run: where they listen, which of them is named if it hangs, and what they leave behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from megatron_rl.observability.metrics import read_metrics
from megatron_rl.utils.heartbeat import read_beats
from tests.e2e_cpu.conftest import QUICKSTART, RAY_FOLDER, SHORT_WARM_START, CommandLine, Finished, files_with_token
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
ASK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).get_all_node_info()
except AuthenticationError:
    print("refused")
"""


class Live:
    """A run that has taken its first step."""

    def __init__(self, command_line: CommandLine) -> None:
        self.command_line, self.folder = command_line, command_line.folder / "runs/processes"
        self.process = command_line.start(
            "train",
            str(QUICKSTART),
            "run.name=processes",
            *SHORT_WARM_START,
            "evaluation.suites={}",
            "evaluation.probes={}",
            "rollout.engines=1",
            "observability.hang_seconds=30",
            "train.steps=2000",  # more than the run takes until the tests have looked at it
        )
        self.finished: Finished | None = None
        self.pass_step(0)

    def pass_step(self, step: int) -> None:
        """Reads the output up to the first line of a later step. A run does not print every step."""
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("step=") and int(line[len("step=") : line.index("/")]) > step:
                return
        raise AssertionError("".join(lines)[-5000:])

    def end(self) -> Finished:
        """Waits for the end of the run, which has been interrupted or has a rank that hangs."""
        if self.finished is None:
            self.finished = self.command_line.finish(self.process, self.folder.name)
        return self.finished

    def interrupt(self) -> None:
        """Ends the run if no test has done so."""
        if self.finished is None:
            self.process.send_signal(signal.SIGINT)
            self.end()


@pytest.fixture(scope="module")
def live(command_line: CommandLine) -> Iterator[Live]:
    live = Live(command_line)
    yield live
    live.interrupt()


def is_store(port: int) -> bool:
    try:
        TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60)).num_keys()
    except Exception:
        return False
    return True


def test_a_run_listens_on_loopback_and_answers_with_the_token_only(live: Live, tmp_path: Path) -> None:
    """One kind of port is open to other machines, and docs/security.md says so: the store by which the actor's ranks
    find each other. torch gives it no address to listen on."""
    process = psutil.Process(live.process.pid)
    family = [process, *process.children(recursive=True)]
    listening = {
        (each.name(), connection.laddr.ip, connection.laddr.port)
        for each in family
        for connection in each.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for name, _, _ in listening} >= {"gcs_server", "raylet"}
    open_to_others = {entry for entry in listening if entry[1] not in LOOPBACK}
    assert all(is_store(port) for _, _, port in open_to_others), open_to_others

    gcs = next(port for name, _, port in listening if name == "gcs_server")
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    without |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", ASK, f"127.0.0.1:{gcs}"]
    answer = subprocess.run(command, env=without, capture_output=True, text=True)
    assert answer.stdout.strip() == "refused", answer.stderr

    sockets = {
        Path(connection.laddr)
        for each in family
        for connection in each.net_connections("unix")
        if isinstance(connection.laddr, str) and connection.laddr.startswith("/")
    }
    assert sockets and all(path.is_relative_to(RAY_FOLDER) for path in sockets), sockets
    assert stat.S_IMODE(RAY_FOLDER.stat().st_mode) == 0o700
    assert stat.S_IMODE((RAY_FOLDER / "token").stat().st_mode) == 0o600
    token = (RAY_FOLDER / "token").read_text()
    assert not any(token in " ".join(each.cmdline()) for each in family)


def test_a_hanging_rank_is_named_and_the_run_ends(live: Live) -> None:
    """The run names the rank, writes the stacks of all processes, and ends without leaving any process."""
    live.pass_step(read_metrics(live.folder)[-1]["step"])  # a rank that hangs here is missed in the next step
    beats = {beat.process: beat.pid for beat in read_beats(live.folder / "logs/heartbeats")}
    assert set(beats) == {"actor-rank-0", "actor-rank-1", "engine-0"}
    os.kill(beats["actor-rank-1"], signal.SIGSTOP)
    hung = live.end()
    assert hung.status == 2, hung.output
    assert "actor-rank-0 waits for actor-rank-1 (stopped)." in hung.output
    assert "Traceback" not in hung.output
    stacks = {path.stem: path.read_text() for path in (live.folder / "logs/stacks").iterdir()}
    assert set(stacks) == set(beats)
    assert "all_reduce" in stacks["actor-rank-0"]


def test_no_file_of_the_run_has_the_token(live: Live) -> None:
    """`test_resume.py` looks through the checkpoints and the export of another run."""
    live.interrupt()
    assert not files_with_token(live.folder)
