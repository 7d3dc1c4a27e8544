"""The actor on CUDA takes the same steps as on CPU, with Transformer Engine or local layers, on one GPU or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import load_config
from megatron_rl.plan.assumptions import Assumptions
from megatron_rl.plan.memory import stage_memory
from megatron_rl.plan.setup import Setup
from megatron_rl.utils.hardware import GPUS
from tests.gpu.actor_runs import BF16, ENGINE, assert_alike, needs_engine, needs_two, run
from tests.hf_models import config_json

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_first_steps_equal_those_on_the_cpu(tmp_path: Path, dense: Path, dtype: str, tolerance: float) -> None:
    cuda, cpu = (run(tmp_path / device, dense, {"device": device, "dtype": dtype}) for device in ("cuda", "cpu"))
    assert cuda.description.startswith("cuda:0") and cpu.description.startswith("cpu")
    assert_alike(cuda, cpu, tolerance)


@needs_engine
def test_transformer_engine_layers_match_the_local_layers(tmp_path: Path, dense: Path) -> None:
    """The local layers run in fp32."""
    engine, local = run(tmp_path / "bf16", dense, BF16), run(tmp_path / "fp32", dense, BF16 | {"dtype": "float32"})
    assert "Transformer Engine layers" in engine.description and "local layers" in local.description
    assert_alike(engine, local, 3e-2)


@needs_engine
@pytest.mark.measured  # the arithmetic of FP8 has no stand-in
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs Hopper")
@pytest.mark.parametrize("fp8", ["blockwise", "tensorwise"])
def test_fp8_matches_bf16_up_to_rounding(tmp_path: Path, dense: Path, fp8: str) -> None:
    assert_alike(run(tmp_path / fp8, dense, BF16 | {"fp8": fp8}), run(tmp_path / "bf16", dense, BF16), 0.15)


@needs_engine
def test_grouped_experts_match_sequential_experts(tmp_path: Path, sparse: Path) -> None:
    ways = [run(tmp_path / way, sparse, BF16 | {"expert_gemm": way}) for way in ("grouped", "sequential")]
    assert_alike(*ways, tolerance=3e-2)


@needs_two
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2},
        {"data_parallel": 2},
        pytest.param({"context_parallel": 2}, marks=needs_engine),
    ],
    ids=str,
)
def test_two_gpus_match_one(tmp_path: Path, dense: Path, layout: dict[str, Any]) -> None:
    assert_alike(run(tmp_path / "two", dense, BF16 | layout), run(tmp_path / "one", dense, BF16), 3e-2)


@needs_two
@needs_engine
def test_grouped_experts_on_two_gpus_match_those_on_one(tmp_path: Path, sparse: Path) -> None:
    layout = {"data_parallel": 2, "expert_parallel": 2}
    assert_alike(run(tmp_path / "two", sparse, BF16 | layout), run(tmp_path / "one", sparse, BF16), 3e-2)


@pytest.mark.measured
@pytest.mark.parametrize("change", [{}, {"offload_optimizer": True}, {"recompute": {"granularity": "full"}}], ids=str)
def test_a_billion_parameters_use_the_memory_that_plan_predicts(tmp_path: Path, change: dict[str, Any]) -> None:
    shape = dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=14, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config_json("qwen3", **shape)))
    actor = BF16 | {"micro_batch_tokens": 8192} | change
    rows = {"count": 16, "prompt": 512, "response": 1536, "vocabulary": 151936}
    found = run(tmp_path / "run", tmp_path / "model", actor, rows=rows, load=False, logits=False)
    assert all(norm > 0 for norm in found.grad_norms)
    expected = planned(tmp_path, actor, rows)
    assert found.peak_bytes is not None
    print(f"{change}: {found.peak_bytes / 2**30:.2f} GiB, plan {expected / 2**30:.2f} GiB")
    assert found.peak_bytes == pytest.approx(expected, rel=0.1)


def planned(folder: Path, actor: dict[str, Any], rows: dict[str, int]) -> float:
    """Returns the planned bytes of a step's largest phase, without the CUDA context and fragmentation."""
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"train": "none.jsonl", "max_prompt_tokens": rows["prompt"]},
        "rollout": {
            "prompts_per_step": rows["count"] // 2,
            "samples_per_prompt": 2,
            "max_response_tokens": rows["response"],
        },
        "reward": {"name": "math"},
        "train": {"steps": 1},
        "algorithm": {"name": "grpo"},
        "actor": actor,
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    lengths = {"mean_prompt": rows["prompt"], "mean_response": rows["response"] - 0.01}
    assumed = Assumptions(**lengths, transformer_engine=ENGINE)
    phases = stage_memory(Setup.of(load_config(folder / "run.yaml", []), GPUS["h100"], assumed), 0).phases
    return max(sum(phases[name].values()) for name in ("forward and backward", "optimizer"))
