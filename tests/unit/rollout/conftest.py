"""Engines around random models small enough to check token by token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl.rollout.transformers_engine import TransformersEngine
from tests.hf_models import write_hf_model


def write_model(folder: Path, *, seed: int, tied: bool) -> Path:
    """A model whose distributions are far from uniform, so that log-probs tell tokens and positions apart."""
    return write_hf_model(folder, seed=seed, tie_word_embeddings=tied, initializer_range=0.3)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def model_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape and different weights."""
    folder = tmp_path_factory.mktemp("models")
    tied = request.param
    return write_model(folder / "a", seed=0, tied=tied), write_model(folder / "b", seed=1, tied=tied)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), seed=0, tied=True)


@pytest.fixture(scope="session")
def engine(model_folder: Path) -> TransformersEngine:
    """For tests that leave it as it is."""
    return TransformersEngine(model_folder, "cpu", "float32")
