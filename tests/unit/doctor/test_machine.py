"""Findings of doctor about a machine."""

from __future__ import annotations

import resource
import socket
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.doctor import machine, versions
from megatron_rl.doctor.findings import Finding
from megatron_rl.rollout.servers.server_process import free_port


def states(findings: object) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}  # type: ignore[attr-defined]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a fake nvidia-smi, whose output the test defines with `set_output`."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def set_output(program: Path, *lines: str, status: int = 0) -> None:
    text = "\n".join(lines)
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    program.chmod(0o755)


HEALTHY = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, 0"


def test_healthy_gpus_are_one_finding(nvidia_smi: Path) -> None:
    set_output(nvidia_smi, *(f"{number}, {HEALTHY}" for number in range(8)))
    (finding,) = machine.check_gpus("cuda")
    assert finding.state == "ok"
    assert finding.found == "8 x NVIDIA H100 80GB HBM3 (80 GiB), driver 580.95.05"


def test_memory_errors_used_gpus_and_mixed_kinds_are_reported(nvidia_smi: Path) -> None:
    set_output(
        nvidia_smi,
        f"0, {HEALTHY}",
        "1, NVIDIA A100-SXM4-80GB, 580.95.05, 81920, 70000, [N/A]",
        "2, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, 3",
    )
    found = {finding.check: finding for finding in machine.check_gpus("cuda")}
    assert {name: finding.state for name, finding in found.items()} == {
        "GPUs": "warning",
        "GPU 1": "warning",
        "GPU 2": "failure",
    }
    assert "68.4 GiB" in found["GPU 1"].found and "3 uncorrected" in found["GPU 2"].found


def test_a_driver_below_the_engines_cuda_is_named(nvidia_smi: Path) -> None:
    set_output(nvidia_smi, "0, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 4, 0")
    found = {finding.check: finding for finding in machine.check_gpus("cuda")}
    assert found["driver"].state == "warning" and "550.54.15; CUDA 13 needs 580 or newer" in found["driver"].found
    assert "install a newer driver" in found["driver"].remedy


def test_a_driver_that_does_not_respond_is_a_failure(nvidia_smi: Path) -> None:
    set_output(nvidia_smi, "NVIDIA-SMI has failed because it couldn't communicate with the driver", status=9)
    (finding,) = machine.check_gpus("cuda")
    assert finding.state == "failure" and "couldn't communicate" in finding.found


def test_missing_gpus_are_a_failure_only_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(machine.check_gpus("cuda")) == {"GPUs": "failure"}
    assert states(machine.check_gpus("cpu")) == {"GPUs": "skipped"}


def test_a_port_in_use_is_named() -> None:
    port = free_port()  # none of those that the system gives away, so that nobody else takes it meanwhile
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        finding = machine.check_ports([port])
        assert finding.state == "warning" and str(port) in finding.found
    assert machine.check_ports([port]).state == "ok"


def test_low_limits_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_limit(value: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (value, value))

    set_limit(1024)
    assert states(machine.check_limits("cuda")) == {"open files": "warning", "locked memory": "warning"}
    assert states(machine.check_limits("cpu")) == {"open files": "warning"}
    set_limit(resource.RLIM_INFINITY)
    assert states(machine.check_limits("cuda")) == {"open files": "ok", "locked memory": "ok"}


def test_shared_memory(tmp_path: Path) -> None:
    assert machine.check_shared_memory("cpu", path=tmp_path / "absent").state == "warning"
    small = machine.check_shared_memory("cpu", 2.0**60, tmp_path)
    assert small.state == "failure" and "for weights (weight_sync.transport: shared_memory)" in small.remedy


@pytest.mark.parametrize(("free_gib", "state"), [(16, "ok"), (14, "warning"), (11.5, "warning"), (10.5, "failure")])
def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str) -> None:
    """Ten GiB are sure to be needed, and five more may be: a small run must not be refused on a disk that it fits."""
    usage = SimpleNamespace(free=free_gib * machine.GIB)
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda _: usage)
    found = machine.check_disk(tmp_path / "not/there/yet", 10 * machine.GIB, 5 * machine.GIB, "a run")
    assert found.state == state
    assert ("train.keep_checkpoints" in found.remedy) == (state != "ok")


def test_a_ray_that_ignores_its_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray knows RAY_AUTH_MODE=token since 2.52; an earlier one leaves a cluster open without a word."""
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["dependencies"]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: declared)
    real = versions.installed
    for installed, state in (("2.51.2", "failure"), ("2.52.0", None)):
        monkeypatch.setattr(versions, "installed", lambda name, ray=installed: ray if name == "ray" else real(name))
        found = {finding.check: finding.state for finding in versions.check_versions("cpu")}
        assert found.get("ray") == state


def test_unsupported_versions_are_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"ray": "1.13", "rich": None}
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: installed.get(name, real(name)))
    found: dict[str, Finding] = {finding.check: finding for finding in versions.check_versions("cpu")}
    assert found["ray"].state == found["rich"].state == "failure"
    assert found["ray"].found.startswith("1.13; >=") and found["ray"].remedy.startswith("pip install 'ray")
    assert found["rich"].found == "not installed"
    assert found["packages"].state == "ok" and "megatron-core" in found["packages"].found


@pytest.mark.parametrize(
    ("output", "state", "words"),
    [
        ("0.5.23", "ok", "0.5.23 (rollout.server.python"),
        ("0.4.1", "warning", "0.4.1"),
        ("", "failure", "not installed"),
        (None, "failure", "No such file"),
    ],
)
def test_the_engine_is_checked_in_its_own_environment(
    tmp_path: Path, output: str | None, state: str, words: str
) -> None:
    interpreter = tmp_path / "python"
    if output is not None:
        interpreter.write_text(f"#!/bin/sh\necho '{output}'\n")
        interpreter.chmod(0o755)
    common = {"prompts_per_step": 1, "samples_per_prompt": 2, "max_response_tokens": 8}
    rollout = RolloutSettings.model_validate({**common, "engine": "sglang", "server": {"python": interpreter}})
    finding = versions.check_server(rollout)
    assert finding is not None and (finding.state, words in finding.found) == (state, True)
    assert state == "ok" or finding.remedy
    embedded = RolloutSettings.model_validate(common)
    assert versions.check_server(embedded) is None  # the transformers engine needs no package of its own


def test_optional_gpu_packages_are_checked_on_gpus_only() -> None:
    optional = {"transformer-engine", "apex", "flash-attn"}
    assert optional <= states(versions.check_versions("cuda")).keys()
    assert not optional & states(versions.check_versions("cpu")).keys()


def test_transformer_engine_outside_its_window_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    for version, state in (("2.3.0", "failure"), ("2.16.0+4220403e", "ok")):
        monkeypatch.setattr(
            versions, "installed", lambda name, v=version: v if name == "transformer-engine" else real(name)
        )
        found = {finding.check: finding for finding in versions.check_versions("cuda")}["transformer-engine"]
        assert found.state == state and version in found.found
        assert state == "ok" or "nvcr.io/nvidia/pytorch" in found.remedy
