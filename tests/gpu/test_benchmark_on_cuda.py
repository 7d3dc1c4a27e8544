"""The token-statistics benchmark runs one small round of its CUDA variants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "token_stats.py"


@pytest.mark.gpu
@pytest.mark.measured
def test_the_token_statistics_benchmark_runs_on_cuda(tmp_path: Path) -> None:
    sizes = ["--tokens", "128", "--vocab", "1024", "--width", "64", "--dtype", "bfloat16", "--rounds", "1"]
    out = tmp_path / "results.json"
    subprocess.run([sys.executable, BENCHMARK, "--device", "cuda", *sizes, "--out", out], check=True, timeout=280)
    results = json.loads(out.read_text())
    assert not any("Triton" in reason for reason in results["not_run"].values())
    assert all(variant["wall_seconds"] > 0 and variant["peak_mib"] > 0 for variant in results["variants"].values())
