"""The sinks with the real packages, offline: what a run writes is read back with the packages' own readers.

W&B, MLflow and Trackio are in an environment of their own: `make test-sinks`.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.observability import ObservabilitySettings
from megatron_rl.observability import sinks
from megatron_rl.observability.sinks import open_sinks

METRICS = ({"reward/mean": 0.25, "eval/a/avg@8": 0.5}, {"reward/mean": 0.75})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection but to this machine."""
    connect = socket.socket.connect

    def guarded(own: socket.socket, address: Any) -> None:
        if own.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a sink connects to {address}")
        connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-own"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 900)  # a busy machine is no reason to lose metrics here


def write(settings: Mapping[str, Any], folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writes two steps in one run, and a third after a resume."""
    observability = ObservabilitySettings.model_validate({"tensorboard": False, **settings})
    for last_step, steps in ((None, METRICS), (2, ({"reward/mean": 1.0},))):
        (sink,) = open_sinks(observability, "mine", folder, {"seed": 3}, last_step)
        for place, metrics in enumerate(steps):
            sink.write((last_step or 0) + place + 1, 1.8e9 + place, metrics)
        sink.close()
    assert not caplog.records, caplog.text


def test_tensorboard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write({"tensorboard": True}, tmp_path, caplog)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["eval/a/avg@8", "reward/mean"]
    assert [(event.step, event.value) for event in read.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75), (3, 1.0)]


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yields the records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    place, record, block = 7, b"", 32768
    while place + 7 <= len(content):
        if block - place % block < 7:  # too little for another header: padding
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.sinks
def test_wandb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    write({"wandb": {"project": "p", "mode": "offline"}}, tmp_path, caplog)
    wandb.teardown()  # its service writes the last block of a file after `finish` returns, and before it ends itself
    files = sorted(tmp_path.rglob("run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name, "both starts have the id of one run"
    found: list[tuple[str, str]] = []
    for data in (data for file in files for data in wandb_records(file.read_bytes())):
        record = Record()
        record.ParseFromString(data)
        found += [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
    assert [value for key, value in found if key == "reward/mean"] == ["0.25", "0.75", "1"]
    assert [value for key, value in found if key == "_step"] == ["1", "2", "3"]


@pytest.mark.sinks
def test_mlflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient

    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    write({"mlflow": {"tracking_uri": address, "experiment": "e"}}, tmp_path, caplog)
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("e")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted((point.step, point.value) for point in history) == [(1, 0.25), (2, 0.75), (3, 1.0)]
    assert run.data.metrics["eval/a/avg_at_8"] == 0.5 and run.info.status == "FINISHED"


@pytest.mark.sinks
def test_trackio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write({"trackio": {"project": "p"}}, tmp_path, caplog)
    from trackio.sqlite_storage import SQLiteStorage

    points = SQLiteStorage.get_logs("p", "mine")
    assert [(point["step"], point["reward/mean"]) for point in points] == [(1, 0.25), (2, 0.75), (3, 1.0)]


def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(AssertionError, match="Trackio gets no more metrics"):
        write({"trackio": {"project": "p"}}, tmp_path, caplog)
