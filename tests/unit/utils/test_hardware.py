"""The table of GPUs, and the rate metrics that are compared with it."""

from __future__ import annotations

import pytest

from megatron_rl.training.metrics import rate_metrics
from megatron_rl.utils.hardware import GPUS, known_gpu


def test_rates_are_per_rank_and_utilisation_needs_known_hardware() -> None:
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
def test_gpus_are_known_by_the_name_that_the_driver_gives(device: str, name: str | None) -> None:
    assert known_gpu(device) == (GPUS[name] if name else None)
