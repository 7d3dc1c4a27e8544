"""Tests of heartbeats, and of the explanation of a run that hangs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_rl.cli import main
from megatron_rl.cluster.hang import Evidence, examine, explain
from megatron_rl.utils import heartbeat
from megatron_rl.utils.heartbeat import IDLE, Beat, Heartbeat, read_beats

GLOO_STACK = "Thread 0x7F (idle): main\n    all_reduce (torch/distributed/distributed_c10d.py:30)\n    train (w.py:3)\n"
PLAIN_STACK = "Thread 0x7F (active): main\n    linear (torch/nn/functional.py:10)\n    train (w.py:3)\n"


def beat(process: str, call: str = "train", doing: str = "micro-batch 2 of 5") -> Beat:
    return Beat(process, 1, "node", call, doing, 7, time.time() - 90, 1.5)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    code = "import sys, time\ndef a_place_to_be_found():\n    print(flush=True); time.sleep(600)\na_place_to_be_found()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def test_the_last_beat_is_read_back(tmp_path: Path) -> None:
    first, second = Heartbeat(tmp_path, "actor-rank-0", "n"), Heartbeat(tmp_path, "engine-0", "n")
    first.write("train", "")
    first.write(None, "micro-batch 12 of 30")
    second.write("generate", "a long text " * 3)
    second.write(IDLE, "")
    found = {beat.process: beat for beat in read_beats(tmp_path)}
    assert (found["actor-rank-0"].call, found["actor-rank-0"].doing) == ("train", "micro-batch 12 of 30")
    assert (found["engine-0"].call, found["engine-0"].doing) == (IDLE, "")
    assert found["actor-rank-0"].count == found["engine-0"].count == 3


def test_memory_metrics_are_the_highest_peak_per_kind_of_process(tmp_path: Path) -> None:
    Heartbeat(tmp_path, "actor-rank-0", "n")
    (own,) = read_beats(tmp_path)
    assert psutil.Process().memory_info().rss / 2**30 / 2 < own.memory_gib < 1000
    metrics = heartbeat.memory_metrics([own, replace(own, memory_gib=own.memory_gib + 1), beat("engine-0")])
    assert metrics["memory/actor_gib"] == own.memory_gib + 1 and metrics["memory/engine_gib"] == 1.5


def test_notify_without_a_heartbeat_does_nothing() -> None:
    heartbeat.notify("an activity")


def test_status_prints_one_line_per_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    Heartbeat(tmp_path / "logs" / "heartbeats", "actor-rank-0", "n").write("train", "micro-batch 1 of 2")
    assert main(["status", str(tmp_path)]) == 0
    assert re.search(r"actor-rank-0  train: micro-batch 1 of 2, for \d+ s \(pid ", capsys.readouterr().out)


def test_a_running_process_is_examined(sleeper: subprocess.Popen[bytes]) -> None:
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_SLEEPING:
        time.sleep(0.01)
    found = examine(sleeper.pid)
    assert found.state == psutil.STATUS_SLEEPING and "a_place_to_be_found" in found.stack
    assert not found.in_collective


def test_a_stopped_process_is_distinguished_from_a_dead_one(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    assert examine(sleeper.pid).state == "stopped"
    sleeper.kill()
    sleeper.wait()
    assert examine(sleeper.pid).state == "gone"


@pytest.mark.parametrize(
    ("beats", "evidence", "words"),
    [
        (
            [beat("actor-rank-0"), beat("actor-rank-1"), beat("engine-0", IDLE, "")],
            {"actor-rank-0": Evidence("sleeping", GLOO_STACK), "actor-rank-1": Evidence("running", PLAIN_STACK)},
            "actor-rank-0 waits in a collective operation for actor-rank-1, which is not in one.",
        ),
        (
            [beat("actor-rank-0"), beat("actor-rank-1")],
            {"actor-rank-0": Evidence("sleeping", GLOO_STACK), "actor-rank-1": Evidence("stopped", PLAIN_STACK)},
            "actor-rank-0 waits for actor-rank-1 (stopped).",
        ),
        (
            [beat("actor-rank-0"), beat("actor-rank-1")],
            {name: Evidence("sleeping", GLOO_STACK) for name in ("actor-rank-0", "actor-rank-1")},
            "are all in a collective operation",
        ),
        ([beat("engine-0", "generate")], {"engine-0": Evidence("gone", "")}, "waits for engine-0 (gone)."),
        ([beat("a", IDLE, "")], {"a": Evidence("sleeping", PLAIN_STACK)}, "the driver itself makes no progress"),
    ],
)
def test_the_explanation_names_the_process_that_blocks_the_others(
    beats: list[Beat], evidence: dict[str, Evidence], words: str
) -> None:
    text = explain(beats, evidence, 61)
    assert "no process has made progress for 1 min 01 s" in text
    assert all(f"{beat.process}" in text for beat in beats)
    assert words in text
