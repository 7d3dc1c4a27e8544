"""What doctor says of nodes that differ, do not share files, or cannot talk: each with what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cluster import probe
from megatron_rl.cluster.probe import Collectives
from megatron_rl.config import Config, load_config
from megatron_rl.doctor import cluster
from megatron_rl.doctor.findings import Finding
from tests.unit.doctor.test_doctor_command import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return load_config(tmp_path / "mine.yaml", ["actor.device=cpu", "actor.data_parallel=2"])


def nodes_that_say(
    monkeypatch: pytest.MonkeyPatch, folder: Path, versions: tuple[str, str], sees: tuple[bool, bool], ahead: float
) -> None:
    """Two nodes, a and b."""

    def look(*_: Any) -> list[cluster.Report]:
        hosts = ("a", "b")
        for host, seen in zip(hosts, sees, strict=True):
            if seen:
                (folder / host).touch()
        return [
            (host, seen, [Finding("packages", "ok", version)])
            for host, seen, version in zip(hosts, sees, versions, strict=True)
        ]

    monkeypatch.setattr(probe, "on_every_node", look)
    monkeypatch.setattr(probe, "clock_skews", lambda _: [(0.0, 0.1), (ahead, 0.1)])


def found(findings: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_nodes_that_are_well(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_that_say(monkeypatch, tmp_path, ("torch 2.13", "torch 2.13"), (True, True), 0.01)
    said = found(cluster._check_nodes(config, None, tmp_path))  # type: ignore[arg-type]
    assert {finding.state for finding in said.values()} == {"ok"}
    assert {"file system", "nodes alike", "a: clock", "b: clock"} <= said.keys()


def test_nodes_that_are_not(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_that_say(monkeypatch, tmp_path, ("torch 2.13", "torch 2.8"), (True, False), 60.0)
    said = found(cluster._check_nodes(config, None, tmp_path))  # type: ignore[arg-type]
    assert said["file system"].state == "failure" and "not the same on b" in said["file system"].found
    assert said["nodes alike"].state == "failure" and "torch 2.8" in said["nodes alike"].found
    assert said["b: clock"].state == "warning" and "+60.00 s" in said["b: clock"].found
    assert all(said[name].remedy for name in ("file system", "nodes alike", "b: clock"))


def test_ranks_that_cannot_talk(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Collectives:
        raise RuntimeError("a traceback\nno answer within 180 s from [1] of 2")

    monkeypatch.setattr(probe, "collectives", fail)
    (finding,) = cluster._check_groups(config, None, tmp_path)  # type: ignore[arg-type]
    assert (finding.state, finding.found) == ("failure", "no answer within 180 s from [1] of 2")
    assert "NCCL_SOCKET_IFNAME" in finding.remedy


def test_two_versions_of_nccl(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [{"all ranks": ((0, 1), 0.001)}] * 2
    answers = Collectives(["nccl 2.27.3 for CUDA 12.9", "nccl 2.21.5 for CUDA 12.4"], both)
    monkeypatch.setattr(probe, "collectives", lambda *_: answers)
    said = found(cluster._check_groups(config, None, tmp_path))  # type: ignore[arg-type]
    assert said["NCCL or gloo"].state == "failure" and "2.21.5" in said["NCCL or gloo"].found
    assert said["all ranks"].state == "ok" and "1 x 2 ranks" in said["all ranks"].found


def test_a_cluster_that_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "mine.yaml", ["actor.device=cuda", "actor.tensor_parallel=16"])
    (finding,) = cluster.check_cluster(config)
    assert (finding.check, finding.state) == ("layout", "failure") and "cluster.gpus_per_node: 8" in finding.found
