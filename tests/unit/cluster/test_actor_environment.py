"""Ranks on GPUs get their environment before they start, and the log says which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.actor.interface import ActorRank
from megatron_rl.cluster import actors
from megatron_rl.config.actor import ActorSettings
from megatron_rl.parallel.layout import Layout, layout_of
from tests.hf_models import write_hf_model


class Rank:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def submit(self, method: Any, *arguments: Any) -> Any:
        self.calls.append(method.__name__)
        return {"start": "cuda:0", "device_name": "NVIDIA H100 80GB HBM3"}.get(method.__name__)

    def node_address(self) -> str:
        return "127.0.0.1"

    def devices(self) -> str:
        return "0"


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *, on_gpu: bool, shared: bool) -> tuple[Any, list[Any]]:
    given: list[Any] = []
    calls: list[str] = []

    def host_process(make: Any, **settings: Any) -> Rank:
        given.append(settings["variables"])
        return Rank(calls)

    monkeypatch.setattr(actors, "host_process", host_process)
    monkeypatch.setattr(actors, "results", list)
    placement = SimpleNamespace(actors=(0, 0), on_gpu=on_gpu, shared=((0, 1),) if shared else ())
    settings = ActorSettings(tensor_parallel=2)
    model = write_hf_model(folder / "model")
    started = actors.Actors(settings, layout_of(settings), model, folder, SimpleNamespace(placement=placement))
    started.release_memory()
    started.calls = calls
    return started, given


def test_every_rank_on_a_gpu_gets_the_same_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, given = start(monkeypatch, tmp_path, on_gpu=True, shared=False)
    assert len(given) == 2 and given[0] == given[1]
    assert given[0]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and given[0]["NCCL_CUMEM_ENABLE"] == "0"
    assert started.description.splitlines()[-1].strip().startswith("environment of the ranks: NCCL_CUMEM_ENABLE=0")
    assert ActorRank.release_memory.__name__ not in started.calls


def test_ranks_on_a_cpu_do_without_torchs_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, given = start(monkeypatch, tmp_path, on_gpu=False, shared=False)
    assert given == [{"TORCHDYNAMO_DISABLE": "1"}] * 2 and "environment" not in started.description


def test_ranks_free_memory_if_engines_share_their_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, _ = start(monkeypatch, tmp_path, on_gpu=True, shared=True)
    assert started.calls[-2:] == ["release_memory"] * 2
    assert Layout(tensor=2).world_size == len(started.ranks)
