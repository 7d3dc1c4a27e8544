"""Every socket on which a run listens: its address, and that it answers nobody without the key."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from megatron_rl.utils.heartbeat import read_beats
from tests.e2e_cpu.conftest import QUICKSTART, SHORT_WARM_START, CommandLine
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


def is_store(port: int) -> bool:
    try:
        TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60)).num_keys()
    except Exception:
        return False
    return True


def test_a_run_listens_on_loopback_and_answers_with_the_token_only(command_line: CommandLine, tmp_path: Path) -> None:
    """One kind of port is open to other machines, and docs/security.md says so: the store by which the actor's ranks
    find each other. torch gives it no address to listen on."""
    process = command_line.start(
        "train",
        str(QUICKSTART),
        "run.name=ports",
        *SHORT_WARM_START,
        "evaluation.suites={}",
        "evaluation.probes={}",
        "rollout.engines=1",
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step=1/"):
            break
    assert read_beats(command_line.folder / "runs/ports/logs/heartbeats")
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
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
    private = Path("/tmp") / f"mrl-ray-{os.getuid()}"
    assert sockets and all(path.is_relative_to(private) for path in sockets), sockets
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "token").stat().st_mode) == 0o600

    token = (private / "token").read_text()
    assert not any(token in " ".join(each.cmdline()) for each in family)
    process.send_signal(signal.SIGINT)
    command_line.finish(process, "ports")
    kept = [path for path in (command_line.folder / "runs/ports").rglob("*") if path.is_file()]
    assert kept and not any(token.encode() in path.read_bytes() for path in kept)
