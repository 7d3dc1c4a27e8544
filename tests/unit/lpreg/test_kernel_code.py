"""The machine code of the kernels for sm_90, which needs no GPU: no spills, 16-byte accesses, few instructions."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lpreg.statistics import kernels

NVIDIA = Path(triton.__file__).parent / "backends/nvidia/bin"
MASSES = {
    "chosen": "*i64",
    "thresholds": "*fp32",
    "highs": "*fp32",
    "log_totals": "*fp32",
    "out": "*fp32",
    "count": "i32",
}
GRADIENT = {
    "out_stride": "i64",
    "targets": "*i64",
    "tasks": "*i8",
    **dict.fromkeys(
        ("thresholds", "highs", "log_totals", "kepts", "droppeds", "onehots", "entropy_factors", "entropies"), "*fp32"
    ),
}
KERNELS = {
    "_summarise": ({"targets": "*i64", "out": "*fp32", "rows": "i32"}, {}),
    "_filter_masses": (MASSES, {}),
    "_write_gradient": (GRADIENT, {"ENTROPY": False}),
}
LIMIT = 12.0
"""Instructions per element in the main loop; the copy rate of an H200 leaves time for about this many in bf16."""


@dataclass(frozen=True)
class Code:
    sass: str
    usage: str

    @property
    def instructions(self) -> list[tuple[int, str]]:
        """Pairs of address and operation."""
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", self.sass)
        return [(int(address, 16), operation) for address, operation in found]

    @property
    def main_loop(self) -> list[str]:
        """The instructions of the longest loop."""
        jumps = re.findall(r"/\*([0-9a-f]{4,})\*/[^\n]*BRA 0x([0-9a-f]+)", self.sass)
        loops = [(int(to, 16), int(at, 16)) for at, to in jumps if int(to, 16) < int(at, 16)]
        return max(
            ([name for address, name in self.instructions if start <= address <= end] for start, end in loops), key=len
        )


def compiled(name: str, dtype: str, tmp_path: Path) -> Code:
    """Compiles for a vocabulary slice whose size is divisible by 16, as every real one is."""
    module: Any = kernels.load()
    kernel, (arguments, switches) = getattr(module, name), KERNELS[name]
    constants = {"SCALE": False, "BLOCK": module.BLOCK, **switches}
    types = {"logits": dtype, "stride": "i64", "out": dtype, "columns": "i32", "cooling": "fp32", **arguments}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if types.get(argument, "").startswith("*") or argument in ("stride", "out_stride", "columns")
    }
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": module.WARPS})
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    sass, usage = (
        subprocess.run([NVIDIA / "cuobjdump", option, path], capture_output=True, text=True, check=True)
        for option in ("--dump-sass", "-res-usage")
    )
    return Code(sass.stdout, usage.stdout + usage.stderr)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code_has_few_instructions_and_no_spills(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    code = compiled(name, dtype, tmp_path)
    assert re.search(r"STACK:0 .*LOCAL:0", code.usage), code.usage
    assert not [operation for _, operation in code.instructions if operation.startswith(("LDL", "STL"))], "spills"
    module: Any = kernels.load()
    elements = module.BLOCK / (32 * module.WARPS)
    assert len(code.main_loop) / elements <= LIMIT
    loads = [operation for operation in code.main_loop if operation.startswith("LDG")]
    assert len(loads) == elements * (2 if dtype == "*bf16" else 4) / 16, "one read, 16 bytes at a time"
    assert all(load.startswith("LDG.E.128") for load in loads)
