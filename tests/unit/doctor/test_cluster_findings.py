"""Findings of doctor about nodes that differ, do not share files or cannot communicate, each with a remedy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.cluster import probe
from megatron_rl.cluster.probe import Collectives
from megatron_rl.config import Config, load_config
from megatron_rl.doctor import cluster
from megatron_rl.doctor.findings import Finding
from tests.unit.doctor.test_doctor_command import CONFIG
from tests.unit.utils.test_environments import ACTOR, ENGINE, interpreter


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return load_config(tmp_path / "mine.yaml", ["actor.device=cpu", "actor.data_parallel=2"])


def fake_nodes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, versions: tuple[str, str], sees: tuple[bool, bool], ahead: float
) -> None:
    """Replace the probes by reports of two nodes, a and b."""

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


def by_check(findings: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_equal_nodes_are_ok(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nodes(monkeypatch, tmp_path, ("torch 2.13", "torch 2.13"), (True, True), 0.01)
    result = by_check(cluster._check_nodes(config, None, tmp_path))  # type: ignore[arg-type]
    assert {finding.state for finding in result.values()} == {"ok"}
    assert {"file system", "nodes alike", "a: clock", "b: clock"} <= result.keys()


def test_nodes_that_differ_are_reported(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nodes(monkeypatch, tmp_path, ("torch 2.13", "torch 2.8"), (True, False), 60.0)
    result = by_check(cluster._check_nodes(config, None, tmp_path))  # type: ignore[arg-type]
    assert result["file system"].state == "failure" and "not the same on b" in result["file system"].found
    assert result["nodes alike"].state == "failure" and "torch 2.8" in result["nodes alike"].found
    assert result["b: clock"].state == "warning" and "+60.00 s" in result["b: clock"].found
    assert all(result[name].remedy for name in ("file system", "nodes alike", "b: clock"))


def test_a_node_compares_the_environments_of_actor_and_engine(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(interpreter(tmp_path / "actor", ACTOR)))
    server = config.rollout.server.model_copy(update={"python": interpreter(tmp_path / "engine", ENGINE)})
    rollout = config.rollout.model_copy(update={"engine": "sglang", "server": server})
    actor = config.actor.model_copy(update={"device": "cuda"})
    on_gpus = config.model_copy(update={"rollout": rollout, "actor": actor})
    _, _, findings = cluster.look_around(on_gpus, tmp_path)
    result = by_check(findings)
    assert result["NCCL of both sides"].state == "failure" and "2.30.7" in result["NCCL of both sides"].remedy
    assert set(cluster.ALIKE) <= result.keys(), "nodes are compared by these"


def test_ranks_that_cannot_communicate_are_reported(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Collectives:
        raise RuntimeError("a traceback\nno answer within 180 s from [1] of 2")

    monkeypatch.setattr(probe, "collectives", fail)
    (finding,) = cluster._check_groups(config, None, tmp_path)  # type: ignore[arg-type]
    assert (finding.state, finding.found) == ("failure", "no answer within 180 s from [1] of 2")
    assert "NCCL_SOCKET_IFNAME" in finding.remedy


def test_two_versions_of_nccl_are_a_failure(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [{"all ranks": ((0, 1), 0.001)}] * 2
    answers = Collectives(["nccl 2.27.3 for CUDA 12.9", "nccl 2.21.5 for CUDA 12.4"], both)
    monkeypatch.setattr(probe, "collectives", lambda *_: answers)
    result = by_check(cluster._check_groups(config, None, tmp_path))  # type: ignore[arg-type]
    assert result["NCCL or gloo"].state == "failure" and "2.21.5" in result["NCCL or gloo"].found
    assert result["all ranks"].state == "ok" and "1 x 2 ranks" in result["all ranks"].found


def test_a_cluster_that_is_too_small_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "mine.yaml", ["actor.device=cuda", "actor.tensor_parallel=16"])
    (finding,) = cluster.check_cluster(config)
    assert (finding.check, finding.state) == ("layout", "failure") and "cluster.gpus_per_node: 8" in finding.found
