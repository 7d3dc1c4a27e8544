"""A stand-in that lacks something says so by name, so that no case passes by being skipped."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.rehearsal.__main__ import environment
from tests.rehearsal.versions import NEWEST

pytestmark = pytest.mark.rehearsal


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("import transformer_engine_torch as t; t.fused_attn_fwd()", "transformer_engine_torch.fused_attn_fwd"),
        ("import flash_attn_2_cuda as f; f.varlen_bwd()", "flash_attn_2_cuda.varlen_bwd"),
    ],
)
def test_what_has_no_stand_in_is_named(call: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", call], env=environment(*NEWEST), capture_output=True, text=True)
    assert done.returncode == 1 and f"NotImplementedError: {name} has no stand-in" in done.stderr, done.stderr[-2000:]
