"""Compiles FlexAttention over prefix trees for an H100 on a machine without a GPU.

Run as: flex_code.py FOLDER HEADS KV_HEADS. Torch's own compiler writes the Triton kernels, forward and backward, for
tensors that have no data; Triton compiles them to machine code. FOLDER/<number>-<name>.cubin is a kernel, and
FOLDER/found.json has a line per kernel. Nothing runs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Never

PACKAGE = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
ANSWERS: dict[str, Any] = dict(
    is_available=True, is_initialized=True, is_bf16_supported=True, device_count=1, current_device=0,
    get_device_properties=H100, get_device_capability=(9, 0), get_arch_list=["sm_90"], get_device_name=H100.name,
    is_current_stream_capturing=False, synchronize=None, set_device=None, _lazy_init=None, _exchange_device=0,
    _maybe_exchange_device=0, set_rng_state=None,
)  # fmt: skip
"""What functions of `torch.cuda` return."""
POSITIONS, DIM = 1536, 128


class Written(Exception):
    """Both kernels are written."""


def load_device(folder: Path) -> None:
    """Registers the device. Torch looks for one only once, when it is imported."""
    library, source = folder / "gpu.so", Path(__file__).with_name("gpu_that_is_absent.cpp")
    paths = [f"-I{PACKAGE}/include", f"-I{PACKAGE}/include/torch/csrc/api/include", f"-L{PACKAGE}/lib"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *paths, str(source), "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(PACKAGE / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


def answer_as_gpu() -> None:
    """Makes torch and Triton find one H100."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    def answering(answer: Any) -> Any:
        return lambda *arguments, **settings: answer

    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answering(answer))
    state = torch.get_rng_state()
    torch.cuda.get_rng_state = answering(state)
    torch.version.cuda = "12.9"
    active = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0}
    driver = SimpleNamespace(**{name: answering(answer) for name, answer in active.items()})
    triton.runtime.driver.set_active(driver)


def written(heads: int, kv_heads: int) -> list[str]:
    """Returns the programs that torch's compiler writes for the forward and the backward pass."""
    import torch
    from torch._functorch import config as autograd
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_rl.actor.model.flex_tree import block_mask, kernel

    programs: list[str] = []

    class Program:
        def call(self, *arguments: Any) -> Never:
            raise Written

    def keep(graph: GraphLowering) -> Program:
        programs.append(graph.codegen()[0].value)
        return Program()

    GraphLowering.compile_to_module = keep  # type: ignore[method-assign, assignment]
    joint_graph.lazy_init = post_grad.lazy_init = lambda *arguments: None  # patterns are traced with data
    config.use_static_triton_launcher = config.pattern_matcher = False
    config.fx_graph_cache = autograd.enable_autograd_cache = False
    autograd.force_non_lazy_backward_lowering = True
    mask = block_mask(torch.arange(POSITIONS, dtype=torch.int32))
    with FakeTensorMode():
        ends = torch.empty(POSITIONS, dtype=torch.int32, device="cuda")
        for name, table in vars(mask).items():
            if isinstance(table, torch.Tensor):
                setattr(mask, name, torch.empty(table.shape, dtype=table.dtype, device="cuda"))
        mask.mask_mod = lambda batch, head, query, key: (key <= query) & (query < ends[key])
        given = [
            torch.empty(1, POSITIONS, n, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        ]
        try:
            kernel()(*given, block_mask=mask, scale=None, enable_gqa=True)
        except Written:
            return programs
    raise RuntimeError("the compiled program did not run")


def machine_code(program: str, folder: Path) -> list[dict[str, Any]]:
    """Compiles the Triton kernels of a program and writes them into the folder."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None  # it would look for the driver of a GPU
    found = []
    for source in re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", program, re.DOTALL):
        module = PyCodeCache.load(source)
        name, kernel = next((n, k) for n, k in vars(module).items() if hasattr(k, "_precompile_worker"))
        kernel.precompile(warm_cache_only=True)
        for result in kernel.compile_results:
            path = folder / f"{len(list(folder.glob('*.cubin')))}-{name}.cubin"
            path.write_bytes(result.kernel.asm["cubin"])
            target = result.kernel.metadata.target.arch
            found.append({"name": path.name, "arch": target, "shared": result.kernel.metadata.shared})
    return found


def main(folder: Path, heads: int, kv_heads: int) -> None:
    load_device(folder)
    answer_as_gpu()
    programs = written(heads, kv_heads)
    kernels = [machine_code(program, folder) for program in programs]
    (folder / "found.json").write_text(json.dumps(kernels))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
