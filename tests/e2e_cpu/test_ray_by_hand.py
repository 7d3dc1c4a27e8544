"""Several nodes without Slurm: `ray start` on each, and RAY_ADDRESS. Here, two Ray nodes run on one machine."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from megatron_rl.rollout.servers.server_process import free_port
from tests.e2e_cpu.conftest import QUICKSTART, REPOSITORY, CommandLine
from tests.patience import completed
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]

SETTINGS = (
    "cluster.nodes=2",
    "actor.device=cpu",
    "actor.tensor_parallel=1",
    "actor.data_parallel=2",
    "warm_start.batch_size=8",
    "warm_start.phases.0.steps=5",
    "warm_start.phases.1.steps=2",
    "evaluation.suites={}",
    "evaluation.probes={}",
    "train.steps=2",
)
DEVICES = """
import json
from pathlib import Path
import ray
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.placement import place
from types import SimpleNamespace
from megatron_rl.cluster.runtime import host_process, ray_runtime
from megatron_rl.config.cluster import ClusterSettings

cluster = ClusterSettings(nodes=2, gpus_per_node=2, colocate=True)
placement = place(Layout(tensor=2, data=2), 2, cluster, engine_gpus=2, on_gpu=True)
def start(name, node, **given):
    return host_process(SimpleNamespace, log_file=Path(name), nodes=nodes, node=node, **given)
with ray_runtime(placement) as nodes:
    ranks = [start(f"rank-{rank}.log", node, gpus=1) for rank, node in enumerate(placement.actors)]
    nodes.rank_devices = ray.get([rank.devices() for rank in ranks])
    engines = [
        start(f"engine-{i}.log", node, gpus=2, devices=nodes.engine_devices(i))
        for i, node in enumerate(placement.engines)
    ]
    print(json.dumps([nodes.rank_devices, ray.get([engine.devices() for engine in engines])]))
"""


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray cluster with a token: two nodes with four CPUs and two pretended GPUs each. Sets the environment
    variables that users would set."""
    folder = tmp_path_factory.mktemp("ray")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    address = f"{get_node_ip_address()}:{free_port()}"
    before = dict(os.environ)
    short = tempfile.mkdtemp(
        prefix="ray-", dir="/tmp"
    )  # paths of sockets must be short, and no other Ray finds this one there
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": short}
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    port = address.split(":")[1]
    nodes = [_start(folder / "head.log", "--head", f"--port={port}", "--include-dashboard=false")]
    try:
        _wait_for(address, nodes[0])
        os.environ["RAY_ADDRESS"] = address
        nodes.append(_start(folder / "worker.log", f"--address={address}"))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait()
        shutil.rmtree(short, ignore_errors=True)
        os.environ.clear()
        os.environ |= before


def _start(log: Path, *options: str) -> subprocess.Popen[bytes]:
    ray = Path(sys.executable).with_name("ray")
    resources = ("--num-cpus=4", "--num-gpus=2")
    with log.open("wb") as output:
        return subprocess.Popen([ray, "start", "--block", *resources, *options], stdout=output, stderr=output)


def _wait_for(address: str, head: subprocess.Popen[bytes]) -> None:
    host, port = address.split(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            assert head.poll() is None, f"no Ray at {address}"
            time.sleep(0.2)


def test_two_nodes_train(ray_address: str, command_line: CommandLine) -> None:
    finished = command_line.train("by-hand", *SETTINGS)
    assert finished.status == 0, finished.output[-5000:]
    assert [row["step"] for row in finished.metrics] == [0, 1, 2]


def test_each_node_reads_weights_from_its_own_shared_memory(ray_address: str, command_line: CommandLine) -> None:
    """Colocated, as far as a CPU knows this: every engine is on a node of the actor."""
    settings = ("cluster.colocate=true", "weight_sync.transport=shared_memory", "weight_sync.verify_every=1")
    finished = command_line.train("own-memory", *SETTINGS, *settings)
    assert finished.status == 0, finished.output[-5000:]
    assert [row["step"] for row in finished.metrics] == [0, 1, 2]
    assert not (finished.folder / "weights").exists(), "no folder that both nodes see"


def test_colocated_engines_see_the_gpus_of_their_ranks(ray_address: str, tmp_path: Path) -> None:
    """Ray only counts GPUs, so the test needs none."""
    done = completed([sys.executable, "-c", DEVICES], "the placement", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    ranks, engines = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))
    assert sorted(ranks[:2]) == sorted(ranks[2:]) == ["0", "1"]
    assert engines == [f"{ranks[0]},{ranks[1]}", f"{ranks[2]},{ranks[3]}"]


def test_doctor_reports_a_wrong_token(ray_address: str, tmp_path: Path) -> None:
    token = tmp_path / "other"
    token.write_text(secrets.token_hex(32))
    status, output = _doctor(tmp_path, RAY_AUTH_TOKEN_PATH=str(token))
    assert status == 1, output
    assert f"RAY_ADDRESS: {ray_address} refuses the connection" in output and "RAY_AUTH_TOKEN_PATH" in output


def test_without_ray_address_a_run_starts_its_own_ray(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray by default would join any cluster that it finds on the machine."""
    monkeypatch.delenv("RAY_ADDRESS")
    status, output = _doctor(tmp_path)
    assert status == 0 and "1 node of cluster.nodes: 1, started for this" in output, output


def _doctor(folder: Path, **environment: str) -> tuple[int, str]:
    layout = ("actor.device=cpu", "actor.tensor_parallel=1")
    command = [sys.executable, "-m", "megatron_rl.cli", "doctor", str(QUICKSTART), *layout]
    done = completed(command, "doctor", folder, **environment)
    return done.returncode, " ".join(done.stdout.split())
