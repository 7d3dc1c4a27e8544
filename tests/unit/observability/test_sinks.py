"""Tests that no sink can stop training. The services are stand-ins with the calls that the sinks use."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.observability import MlflowSettings, ObservabilitySettings, WandbSettings
from megatron_rl.observability import sinks
from megatron_rl.observability.metrics import MetricsLog, read_metrics
from megatron_rl.observability.sinks import Guarded, InBackground, open_sinks

WANDB = ObservabilitySettings(tensorboard=False, wandb=WandbSettings(project="p", mode="offline"))
MLFLOW = ObservabilitySettings(
    tensorboard=False, mlflow=MlflowSettings(tracking_uri="sqlite:///unused.db", experiment="e")
)


class Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


class Broken(Recorder):
    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("the service is unavailable")


class Stuck(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def write(self, step: int, wall_time: float, metrics: Mapping[str, float]) -> None:
        self.entered.set()
        self.released.wait()
        super().write(step, wall_time, metrics)


def log_steps(folder: Path, sink: sinks.Sink, count: int = 3) -> None:
    log = MetricsLog(folder, keep_up_to_step=None, sinks=[sink])
    for step in range(count):
        log.write(step, {"reward/mean": 0.5, "unknown": None})
    log.close()


def test_metrics_arrive_in_order_and_the_sink_is_closed(tmp_path: Path) -> None:
    recorder = Recorder()
    log_steps(tmp_path, InBackground(Guarded("it", lambda: recorder)), 50)
    assert recorder.steps == list(range(50)) and recorder.closed


@pytest.mark.parametrize("background", [False, True])
def test_a_broken_service_warns_once(tmp_path: Path, background: bool, caplog: pytest.LogCaptureFixture) -> None:
    sink = Guarded("the service", Broken)
    with caplog.at_level(logging.WARNING):
        log_steps(tmp_path, InBackground(sink) if background else sink)
    assert [record.getMessage() for record in caplog.records] == [
        "the service gets no more metrics, training continues: RuntimeError: the service is unavailable"
    ]
    assert len(read_metrics(tmp_path)) == 3


def test_a_service_that_hangs_does_not_delay_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "WAITING_STEPS", 5)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    stuck = Stuck()
    sink = InBackground(Guarded("it", lambda: stuck))
    sink.write(-1, 0.0, {})
    stuck.entered.wait()
    with caplog.at_level(logging.WARNING):
        log_steps(tmp_path, sink, 20)
    assert len(read_metrics(tmp_path)) == 20
    assert "5 steps behind" in caplog.text and "does not respond" in caplog.text
    stuck.released.set()


@pytest.mark.parametrize(("settings", "name"), [(WANDB, "wandb"), (MLFLOW, "mlflow")])
def test_a_missing_package_is_a_warning(
    settings: ObservabilitySettings,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (sink,) = open_sinks(settings, "run", tmp_path, {}, None)
    with caplog.at_level(logging.WARNING):
        log_steps(tmp_path, sink)
    assert name in caplog.text and len(read_metrics(tmp_path)) == 3


def test_wandb_gets_configuration_and_steps_and_the_same_run_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    run = SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None)
    module = ModuleType("wandb")
    module.init = lambda **arguments: (started.append(arguments), run)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for folder in (tmp_path / "a", tmp_path / "b"):
        (sink,) = open_sinks(WANDB, "name", tmp_path, {"seed": 3}, None)
        log_steps(folder, sink)
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert (started[0]["project"], started[0]["config"], started[0]["mode"]) == ("p", {"seed": 3}, "offline")
    assert logged[:3] == [(step, {"reward/mean": 0.5}) for step in range(3)]


def test_mlflow_names_have_no_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowStandIn()
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient = lambda uri: client  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for _ in range(2):
        (sink,) = open_sinks(MLFLOW, "name", tmp_path, {}, None)
        sink.write(4, time.time(), {"eval/a/avg@8": 0.5})
        sink.close()
    assert client.logged == [("r0", ("eval/a/avg_at_8", 0.5, 4))] * 2, "the second start continues the run of the first"


class MlflowStandIn:
    def __init__(self) -> None:
        self.runs: list[Any] = []
        self.logged: list[tuple[str, Any]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "1"

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[Any]:
        return [run for run in self.runs if f"'{run.tag}'" in query]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        run = SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(self.runs)}"), tag=next(iter(tags.values())))
        self.runs.append(run)
        return run

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.logged += [(run_id, metric) for metric in metrics]

    def set_terminated(self, run_id: str) -> None:
        pass
