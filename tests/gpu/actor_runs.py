"""Runs the ranks of `actor_on.py` in processes of their own and returns what they found.

Each case runs in separate processes: on a CPU the platform module changes megatron-core for the whole process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("actor_on.py")
ROOT = Path(__file__).parents[2]
SHAPE: dict[str, Any] = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64,
)  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
ROWS = {"count": 8, "prompt": 20, "response": 40, "vocabulary": 512}
ENGINE = importlib.util.find_spec("transformer_engine") is not None
needs_engine = pytest.mark.skipif(not ENGINE, reason="needs Transformer Engine")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LOUD = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
"""Transformer Engine then logs which attention kernel it chooses."""
BF16 = {"device": "cuda", "dtype": "bfloat16"}


@dataclass(frozen=True)
class Found:
    description: str
    losses: list[float]
    grad_norms: list[float]
    peak_bytes: int | None
    seconds: list[float]
    """Time of each step, between synchronisations of the device."""
    logits: Tensor | None
    """Logits after the last step."""
    synchronisations: dict[str, int] = field(default_factory=dict)
    """Place in the code -> number of times that the host waited there for the GPU, over one step."""
    attention: str | None = None
    """Attention kernel that Transformer Engine chose, by its log."""


def run(folder: Path, model: Path, actor: dict[str, Any], **case: Any) -> Found:
    folder.mkdir()
    settings = {"model": str(model), "actor": {"micro_batch_tokens": 256} | actor, "rows": ROWS, "steps": 3} | case
    (folder / "case.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=environment(settings["actor"]),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    logits = torch.load(folder / "logits.pt") if (folder / "logits.pt").exists() else None
    chosen = re.findall(r"(?:Selected backend|Running with) .*", done.stdout + done.stderr)
    found = json.loads((folder / "found.json").read_text())
    return Found(**found, logits=logits, attention=chosen[-1] if chosen else None)


def environment(actor: dict[str, Any]) -> dict[str, str]:
    """Returns the environment of the ranks. Over the rehearsal, a CPU is a CPU."""
    variables = {**os.environ, **LOUD, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if actor["device"] == "cpu":
        variables.pop("MEGATRON_RL_REHEARSAL", None)
    return variables


def assert_alike(found: Found, expected: Found, tolerance: float, logits: float | None = None) -> None:
    """Compares losses, norms and, on average, logits: in bf16 a few tokens take another expert.

    tolerance: relative, for losses and norms. logits: the same for logits; None: `tolerance`.
    """
    assert found.losses == pytest.approx(expected.losses, rel=tolerance, abs=tolerance)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=tolerance)
    assert found.logits is not None and expected.logits is not None
    assert (found.logits - expected.logits).abs().mean() < (logits or tolerance) * expected.logits.abs().mean()
