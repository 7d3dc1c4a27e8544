"""Engines around random models small enough to check token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.rollout.engines.transformers.engine import TransformersEngine
from megatron_rl.rollout.servers import liveness, requests
from tests.hf_models import write_hf_model
from tests.unit.rollout.attached_engine import Clock
from tests.unit.rollout.faulty_server import Script, faulty_server


def write_model(folder: Path, model_type: str = "qwen3", *, seed: int, tied: bool) -> Path:
    """A model whose distributions are far from uniform, so that log-probs differ between tokens and positions."""
    return write_hf_model(folder, model_type, seed=seed, tie_word_embeddings=tied, initializer_range=0.3)


@pytest.fixture(scope="session", params=["tied", "untied", "experts"])
def model_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape and different weights."""
    folder = tmp_path_factory.mktemp("models")
    tied, model_type = request.param == "tied", "qwen3_moe" if request.param == "experts" else "qwen3"
    first, second = (write_model(folder / str(seed), model_type, seed=seed, tied=tied) for seed in (0, 1))
    return first, second


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=0, tied=True)


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> TransformersEngine:
    """An engine for tests that do not change it."""
    return TransformersEngine(model_folder, "cpu", "float32")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Script]]:
    """A server that fails on command, and whose engine tries again at once."""
    monkeypatch.setattr(requests, "FIRST_BACK_OFF_SECONDS", 0.01)
    with faulty_server() as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock
