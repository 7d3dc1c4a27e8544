"""Small models that the actor trains on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.actor_runs import EXPERTS, SHAPE
from tests.hf_models import write_hf_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("dense") / "model", "qwen3", noise=0.02, **SHAPE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_model(tmp_path_factory.mktemp("sparse") / "model", "qwen3_moe", noise=0.02, **(SHAPE | EXPERTS))
