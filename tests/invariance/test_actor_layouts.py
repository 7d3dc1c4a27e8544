"""An RL step is the same under every layout and every setting that only trades memory for time.

Loss, statistics, logits, gradients and new weights are compared with those of one rank with padded sequences,
materialised logits and default settings otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf_models import write_hf_model

SCRIPT = Path(__file__).parent / "actor_steps.py"
ROOT = Path(__file__).parents[2]

PLAIN = {"rows": "padded", "lm_head": "materialised"}
PACKED = {"rows": "packed"}
"""Without this setting sequences share positions, which is the default on a CPU."""
FULL = {"recompute": {"granularity": "full"}}
SELECTIVE = {"recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]}}
SP = {"sequence_parallel": True}
TIED = {"model": "tied"}
EXPERTS = {"model": "experts"}
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, dict[str, Any]]]] = {
    "one rank": (
        {},
        {
            "plain": PLAIN,
            "tied, plain": TIED | PLAIN,
            "fused": {},
            "tied, fused": TIED,
            "materialised": {"lm_head": "materialised"},
            "packed, fused": PACKED,
            "padded, fused": {"rows": "padded"},
            "full recompute": FULL,
            "selective recompute": SELECTIVE,
            "offloaded optimizer": {"offload_optimizer": True},
            "experts, plain": EXPERTS | PLAIN,
            "experts, fused": EXPERTS,
            "experts, packed, fused": EXPERTS | PACKED,
        },
    ),
    "tp2": (
        {"tensor": 2},
        {
            "tp2, plain": PLAIN,
            "tp2, fused": {},
            "tp2, sp, plain": SP | PLAIN,
            "tied, tp2, sp, plain": TIED | SP | PLAIN,
            "tp2, sp, fused": SP,
            "tp2, sp, packed, fused": SP | PACKED,
            "tied, tp2, sp, fused": TIED | SP,
            "tp2, sp, full recompute": SP | FULL,
            "tp2, sp, selective recompute": SP | SELECTIVE,
        },
    ),
    "pp2": (
        {"pipeline": 2},
        {"pp2, plain": PLAIN, "pp2, fused": {}, "tied, pp2, fused": TIED, "pp2, packed, full recompute": FULL | PACKED},
    ),
    "pp2, interleaved": (
        {"pipeline": 2, "virtual_pipeline": 2},
        {"pp2, interleaved": {}, "tied, pp2, packed, interleaved": TIED | FULL | PACKED},
    ),
    "dp2": (
        {"data": 2},
        {
            "dp2, plain": PLAIN | {"distributed_optimizer": False},
            "dp2, distributed optimizer": {},
            "dp2, packed": PACKED,
        },
    ),
    "tp2-pp2": (
        {"tensor": 2, "pipeline": 2},
        {"tp2-pp2": {}, "tp2-pp2, sp": SP | SELECTIVE, "tied, tp2-pp2, sp": TIED | SP},
    ),
    "tp2-pp2, interleaved": (
        {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2},
        {"tied, tp2-pp2, sp, interleaved": TIED | SP},
    ),
    "dp2-ep2": ({"data": 2, "expert": 2}, {"experts, dp2-ep2": EXPERTS, "experts, dp2-ep2, recompute": EXPERTS | FULL}),
    "tp2-ep2": ({"tensor": 2, "expert": 2}, {"experts, tp2-ep2, sp": EXPERTS | SP}),
    "tp2-dp2": ({"tensor": 2, "data": 2}, {"tied, tp2-dp2, sp": TIED | SP}),
}
VARIANTS = [(layout, variant) for layout, (_, variants) in LAYOUTS.items() for variant in variants]
LOSSES = ("supervised", "lp_reg", "entropy_bonus", "gspo")

Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    for name in ("untied", "tied", "experts"):
        shape = {"vocab_size": 51, "num_hidden_layers": 4, "tie_word_embeddings": name == "tied"}
        write_hf_model(folder / name, "qwen3_moe" if name == "experts" else "qwen3", noise=0.1, **shape)
    return folder


def run(folder: Path, layout: str) -> None:
    """Runs all variants of a layout in one start of its processes."""
    degrees, variants = LAYOUTS[layout]
    if (folder / f"{next(iter(variants))}.pt").exists():
        return
    variants = {name: {"model": "untied"} | variant for name, variant in variants.items()}
    arguments = [json.dumps(degrees), json.dumps(variants), str(folder)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def found(folder: Path, variant: str) -> Found:
    return torch.load(folder / f"{variant}.pt")


@pytest.mark.parametrize(("layout", "variant"), VARIANTS, ids=[variant for _, variant in VARIANTS])
def test_a_step_equals_that_of_one_plain_rank(folder: Path, layout: str, variant: str) -> None:
    run(folder, "one rank")
    run(folder, layout)
    model = next((f"{kind}, " for kind in ("tied", "experts") if kind in variant), "")
    expected, got = found(folder, f"{model}plain"), found(folder, variant)
    torch.testing.assert_close(got["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
    for loss in LOSSES:
        check_step(got[loss], expected[loss])


def check_step(got: Found, expected: Found) -> None:
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for kind in ("seen", "scored"):
        assert torch.equal(got[kind].pop("in_filter"), expected[kind].pop("in_filter"))
        torch.testing.assert_close(got[kind], expected[kind], atol=2e-6, rtol=1e-5)
    assert got["gradient"].keys() == expected["gradient"].keys()
    for name, gradient in expected["gradient"].items():
        error = (got["gradient"][name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name  # the gradient of an expert that no token chose is zero
    torch.testing.assert_close(got["weights"], expected["weights"], atol=1e-6, rtol=1e-6)
