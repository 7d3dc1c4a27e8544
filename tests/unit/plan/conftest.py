from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.plan import Plan
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GPUS

MODELS = Path(__file__).parents[2] / "fixtures/models"
RUN = """\
model: {{path: {model}}}
data: {{train: train.jsonl}}
rollout:
  {{engine: sglang, engines: 16, prompts_per_step: 256, samples_per_prompt: 8, max_response_tokens: 8192}}
reward: {{name: math}}
train: {{steps: 1000, save_every: 20}}
actor:
  {{dtype: bfloat16, tensor_parallel: 4, sequence_parallel: true, data_parallel: 4, recompute: {{granularity: full}}}}
cluster: {{nodes: 4}}
"""
"""Qwen3-14B-Base on 32 GPUs, half of them for engines."""

Make = Callable[..., Plan]


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")
    path.write_text(RUN.format(model=MODELS / "Qwen3-14B-Base"))
    return path


@pytest.fixture
def make(run_file: Path) -> Make:
    """Makes a plan of the run with overrides."""

    def make_plan(*overrides: str, **assumed: float) -> Plan:
        config = load_config(run_file, list(overrides))
        lengths = {"mean_prompt": 200.0, "mean_response": 2700.0}
        return Plan(Setup.of(config, GPUS[config.cluster.gpu], Assumptions(**(lengths | assumed))))

    return make_plan
