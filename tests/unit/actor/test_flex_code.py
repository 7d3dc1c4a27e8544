"""FlexAttention over prefix trees compiles for sm_90, forward and backward, which needs no GPU. Nothing runs there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.patience import completed

SCRIPT = Path(__file__).with_name("flex_code.py")
ROOT = Path(__file__).parents[3]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = 227 * 1024
"""Most shared memory of a block of threads on an H100, in bytes."""


@pytest.mark.slow
def test_both_passes_compile_for_an_h100_and_fit_its_shared_memory(tmp_path: Path) -> None:
    """The heads are those of 14B and 32B models, of which five share a key: no power of two."""
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "0"}
    variables |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    variables |= {"TORCHDYNAMO_DISABLE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "40", "8"]
    done = completed(command, "FlexAttention for sm_90", ROOT, **variables)
    assert done.returncode == 0, done.stdout[-5000:]
    forward, backward = json.loads((tmp_path / "found.json").read_text())
    assert any("flex_attention_0" in kernel["name"] for kernel in forward)
    assert any("flex_attention_backward" in kernel["name"] for kernel in backward)
    for kernel in [*forward, *backward]:
        assert kernel["arch"] == 90 and kernel["shared"] <= SHARED, kernel
        dump = subprocess.run([CUOBJDUMP, "--dump-sass", tmp_path / kernel["name"]], capture_output=True, text=True)
        if "_tem_" in kernel["name"]:
            assert re.search(r"\bHGMMA|\bWGMMA", dump.stdout), "the products run on Hopper's tensor cores"
