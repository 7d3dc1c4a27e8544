"""Operations of passes, against what torch counts; and the rates they are compared with."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.flops import body_flops, pass_flops
from megatron_rl.observability.step_metrics import rate_metrics
from megatron_rl.utils.hardware import GPUS, known_gpu
from tests.hf_models import config_json, hf_model


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_a_pass_takes_what_torch_counts(model_type: str) -> None:
    """torch counts whole squares in attention; half of each is looked at."""
    lengths = [9, 24]
    shape = Architecture.from_hf(config_json(model_type, num_key_value_heads=4))
    model = hf_model(model_type, num_key_value_heads=4, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for length in lengths:
            model(torch.zeros(1, length - 1, dtype=torch.int64))
    unseen = body_flops(shape, 0, sum((length - 1) ** 2 for length in lengths))
    responses = sum(lengths) - len(lengths)  # the first token of each is its prompt
    assert counter.get_total_flops() == pass_flops(shape, lengths, responses) + unseen


def test_rates_are_by_rank_and_known_hardware_only() -> None:
    assert rate_metrics(8e15, 2.0, 4, GPUS["h100"].flops) == {
        "perf/step_tflops": 8e3,
        "perf/tflops_per_second_per_rank": 1e3,
        "perf/model_flops_utilisation": 1e15 / 989e12,
    }
    assert "perf/model_flops_utilisation" not in rate_metrics(1e12, 1.0, 1, None)
    assert rate_metrics(0.0, 1.0, 1, None) == {}, "a step without a pass has no rate"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_gpus_by_the_name_that_the_driver_gives(device: str, name: str | None) -> None:
    assert known_gpu(device) == (GPUS[name] if name else None)
