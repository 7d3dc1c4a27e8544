"""A machine that lacks what a configuration asks for is refused before anything starts."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.parallel.placement import Placement
from megatron_rl.run.requirements import check_engine, check_gpus, check_trackers
from tests.unit.doctor.test_doctor_command import CONFIG

TWO_GPUS = Placement(actors=(0,), engines=(0,), engine_gpus=1, on_gpu=True)


def config_of(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    return load_config(tmp_path / "mine.yaml", list(overrides))


TRACKERS = {
    "wandb": ["observability.wandb.project=mine"],
    "mlflow": ["observability.mlflow={tracking_uri: x, experiment: y}"],
}


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("there", [False, True])
def test_a_service_for_metrics_needs_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    real = importlib.util.find_spec
    answer = {name: real("json") if there else None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: answer.get(module, real(module)))
    config = config_of(tmp_path, *TRACKERS[name])
    check_trackers(config_of(tmp_path))
    if there:
        check_trackers(config)
        return
    with pytest.raises(UserError, match=f"observability.{name} is given.*pip install {name}"):
        check_trackers(config)


@pytest.mark.parametrize(("found", "needed"), [(0, 2), (1, 2)])
def test_too_few_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, found: int, needed: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(UserError, match=f"{needed} GPUs are needed .* torch finds {found}"):
        check_gpus(TWO_GPUS)
    check_gpus(replace(TWO_GPUS, on_gpu=False))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    check_gpus(TWO_GPUS)  # the machines of that Ray count


def test_enough_gpus_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(TWO_GPUS)


def test_several_nodes_need_the_address_of_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="needs 2 nodes, but RAY_ADDRESS names no Ray"):
        check_gpus(Placement(actors=(0, 1), engines=(0,), engine_gpus=0, on_gpu=False))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("output", ["", None])
def test_a_server_must_be_installed_where_it_is_started(tmp_path: Path, engine: str, output: Any) -> None:
    interpreter = tmp_path / "python"
    if output is not None:
        interpreter.write_text("#!/bin/sh\necho ''\n")
        interpreter.chmod(0o755)
    overrides = [f"rollout.engine={engine}", f"rollout.server.python={interpreter}"]
    with pytest.raises(UserError, match=f"rollout.server.python: {interpreter}"):
        check_engine(config_of(tmp_path, *overrides))
    check_engine(config_of(tmp_path, *overrides, "rollout.server.urls=['http://127.0.0.1:9']"))


def test_an_engine_of_ones_own_must_be_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = "from megatron_rl.rollout.engines.kind import EngineKind\nKIND = EngineKind(name='own', engine='{}')\n"
    for module, engine in (("kind_right", "json:loads"), ("kind_wrong", "absent_module:Engine")):
        (tmp_path / f"{module}.py").write_text(kind.format(engine))
    check_engine(config_of(tmp_path, "rollout.engine=kind_right:KIND"))
    with pytest.raises(UserError, match=r"rollout.engine='absent_module:Engine'"):
        check_engine(config_of(tmp_path, "rollout.engine=kind_wrong:KIND"))
