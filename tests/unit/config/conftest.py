from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config import Config, load_config

MINIMAL = """\
model: {path: model}
data: {train: train.jsonl}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_response_tokens: 8}
reward: {name: countdown}
train: {steps: 10}
"""
"""The required keys and nothing else."""

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the minimal file with overrides, or another text, in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def load_text(*overrides: str, text: str = MINIMAL) -> Config:
        path = Path("example.yaml")
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides))

    return load_text
