"""The memory model against the allocations of a real actor on the CPU: state to the byte, passes within a tenth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import load_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.memory import kept_state, stage_memory
from megatron_rl.plan.parameters import rank_parameters
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GPUS
from tests import ranks
from tests.hf_models import config_json
from tests.tiers import chosen, quick_of
from tests.unit.plan.measure import run_rank

PROMPT, RESPONSE, VOCABULARY = 32, 224, 1024
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An actor, a model, and the number of sequences in the batch and in a micro-batch."""

    actor: dict[str, Any]
    model_type: str = "qwen3"
    model: dict[str, Any] | None = None
    sequences: int = 4
    sequences_per_micro_batch: int = 4

    @property
    def settings(self) -> dict[str, Any]:
        tokens = self.sequences_per_micro_batch * (PROMPT + RESPONSE)
        return {"device": "cpu", "micro_batch_tokens": tokens} | self.actor

    @property
    def hf_config(self) -> dict[str, Any]:
        head = {"head_dim": 32} if self.model_type.startswith("qwen3") else {}
        return config_json(self.model_type, **(SHAPE | head | (self.model or {})))


FULL, MLP = {"granularity": "full"}, {"granularity": "selective", "modules": ["mlp"]}
ONE_RANK = {
    "fp32": Case({"dtype": "float32"}),
    "bf16": Case({"dtype": "bfloat16"}),
    "deep": Case({"dtype": "float32"}, model={"num_hidden_layers": 8}),
    "wide": Case({"dtype": "bfloat16"}, model={"intermediate_size": 2048}),
    "llama": Case({"dtype": "bfloat16"}, "llama"),
    "qwen2, materialised logits": Case({"dtype": "float32", "lm_head": "materialised"}, "qwen2"),
    "tied, large vocabulary": Case(
        {"dtype": "bfloat16"}, model={"tie_word_embeddings": True, "vocab_size": 8192, "num_hidden_layers": 2}
    ),
    "recompute all": Case({"dtype": "bfloat16", "recompute": FULL}, model={"num_hidden_layers": 8}),
    "recompute the MLP": Case({"dtype": "float32", "recompute": MLP}, model={"num_hidden_layers": 8}),
    "experts": Case(
        {"dtype": "float32"},
        "qwen3_moe",
        model={"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
}
TWO_RANKS = {
    "tensor": Case({"dtype": "float32", "tensor_parallel": 2}),
    "tensor and sequence": Case({"dtype": "bfloat16", "tensor_parallel": 2, "sequence_parallel": True}),
    "pipeline": Case({"dtype": "float32", "pipeline_parallel": 2}, sequences=8, sequences_per_micro_batch=2),
    "replicas": Case({"dtype": "bfloat16", "data_parallel": 2}, sequences=8),
    "replicated optimizers": Case(
        {"dtype": "bfloat16", "data_parallel": 2, "distributed_optimizer": False}, sequences=8
    ),
}
CASES = ONE_RANK | TWO_RANKS
QUICK = (
    "fp32",
    "bf16",
    "tied, large vocabulary",
    "recompute all",
    "experts",
    "tensor and sequence",
    "pipeline",
    "replicas",
)
every_case = pytest.mark.parametrize("name", quick_of(CASES, QUICK))

Measured = dict[str, list[dict[str, int]]]


def run(cases: dict[str, Case], count: int, folder: Path) -> Measured:
    for name, case in cases.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(case.hf_config))
    plain = {
        name: {
            "actor": case.settings,
            "rows": {"count": case.sequences, "prompt": PROMPT, "response": RESPONSE, "vocabulary": VOCABULARY},
        }
        for name, case in cases.items()
    }
    found = ranks.run_ranks(run_rank, count, plain, folder)
    return {name: [of_rank[name] for of_rank in found] for name in cases}


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    needed, found = chosen(request, "name"), {}
    for count, cases in ((1, ONE_RANK), (2, TWO_RANKS)):
        mine = {name: case for name, case in cases.items() if name in needed}
        found |= run(mine, count, tmp_path_factory.mktemp(f"ranks-{count}"))
    return found


def planned(case: Case, folder: Path) -> Setup:
    (folder / "config.json").write_text(json.dumps(case.hf_config))
    tree = {
        "model": {"path": str(folder)},
        "data": {"train": "none.jsonl", "max_prompt_tokens": PROMPT},
        "rollout": {"prompts_per_step": case.sequences // 2, "samples_per_prompt": 2, "max_response_tokens": RESPONSE},
        "reward": {"name": "math"},
        "train": {"steps": 1},
        "algorithm": {"name": "grpo"},
        "actor": case.settings,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    config = load_config(path, [])
    return Setup.of(config, GPUS["h100"], Assumptions(mean_prompt=PROMPT, mean_response=RESPONSE - 0.01))


@every_case
def test_state_is_exact_to_the_byte(measured: Measured, tmp_path: Path, name: str) -> None:
    setup = planned(CASES[name], tmp_path)
    for rank, found in enumerate(measured[name]):
        stage = rank if setup.layout.pipeline > 1 else 0
        assert rank_parameters(setup.model, setup.layout, stage).total == found["parameters"]
        for part, size in kept_state(setup, stage).items():
            assert size == pytest.approx(found[part], rel=1e-3), (
                part
            )  # buffers are padded, and Adam stores its step count


@pytest.mark.parametrize("phase", ["log-probs", "forward and backward", "optimizer"])
@every_case
def test_passes_are_within_a_tenth(measured: Measured, tmp_path: Path, name: str, phase: str) -> None:
    setup = planned(CASES[name], tmp_path)
    for rank, found in enumerate(measured[name]):
        stage = rank if setup.layout.pipeline > 1 else 0
        state = sum(found.get(part, 0) for part in ("weights", "gradients", "main weights", "moments"))
        memory = stage_memory(setup, stage)
        assert memory.reserved == {}
        assert memory.total(phase) == pytest.approx(state + found[phase], rel=0.1)


@every_case
def test_activations_alone_are_within_a_tenth(measured: Measured, tmp_path: Path, name: str) -> None:
    setup = planned(CASES[name], tmp_path)
    for rank, found in enumerate(measured[name]):
        stage = rank if setup.layout.pipeline > 1 else 0
        phase = stage_memory(setup, stage).phases["forward and backward"]
        beyond = sum(phase.values()) - sum(kept_state(setup, stage).values())
        assert beyond == pytest.approx(found["forward and backward"], rel=0.1)
