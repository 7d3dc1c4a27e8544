"""Weights survive loading into Megatron and export, under TP and PP of 1 to 4 each, whichever side reads or writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "conversion_worker.py"
CASES = ("qwen3", "qwen2", "llama", "qwen3-moe")
SIZES = (1, 2, 3, 4)
LAYOUTS = [f"tp{tensor}-pp{pipeline}" for tensor in SIZES for pipeline in SIZES]
SAVED = ("tp1-pp1", "tp2-pp1", "tp3-pp2", "tp1-pp4", "tp4-pp1")
Differences = dict[str, dict[str, list[dict[str, float]]]]
"""Layout -> case -> for each rank: way -> largest difference."""


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Differences:
    folder = tmp_path_factory.mktemp("conversion")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *CASES],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {
        layout: {case: [rank[layout][case] for rank in ranks if layout in rank] for case in CASES} for layout in LAYOUTS
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_unchanged_in_both_directions(differences: Differences, layout: str, case: str) -> None:
    """In: Megatron reads this project's checkpoint. Out: the export, and what Megatron saves and this project reads."""
    tensor, pipeline = (int(part[2:]) for part in layout.split("-"))
    ranks = differences[layout][case]
    assert len(ranks) == tensor * pipeline
    ways = {"export", "published", "Megatron reads ours"}
    if layout in SAVED:
        ways |= {"we read Megatron's, stacked", "we read Megatron's, by layer"}
    for rank in ranks:
        assert rank == dict.fromkeys(ways, 0.0)
