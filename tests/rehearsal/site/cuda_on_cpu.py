"""CUDA that is the CPU: `torch.cuda` answers as one H100, and tensors that are asked for on it are made on the CPU.

Every tensor counts as a tensor of the GPU unless it carries a mark: `host_tensors.py`. Streams and events do nothing,
since everything runs in order. NCCL is gloo. What is not listed here stays torch's own, which without CUDA raises an
error that names the function.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from types import SimpleNamespace
from typing import Any

import host_tensors
import nccl_is_gloo
import torch
from host_tensors import Waits, of_cuda, on_host
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
MEMORY = 80 * 2**30
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, warp_size=32,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, gcnArchName="", uuid="rehearsal", is_integrated=False,
)  # fmt: skip


RUNTIME = SimpleNamespace(cudaHostRegister=lambda *memory: 0, cudaHostUnregister=lambda pointer: 0)
"""CUDA's own library: it pins memory."""


class Stream:
    """A stream on which everything has already happened."""

    cuda_stream, stream_id, device, priority = 0, 0, GPU, 0

    def __init__(self, *args: Any, **settings: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        Waits.count("stream")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None: ...


class Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **settings: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.001

    def synchronize(self) -> None:
        Waits.count("event")


class CudaOnCpu(TorchFunctionMode):
    """Turns every request for CUDA in a call of torch into one for the CPU, and keeps the marks of host tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return host_tensors.of_same_memory(func(*args, **(kwargs or {})), args[0])
        if func is torch.device and len(args) == 1 and type(args[0]) is int:
            return torch.device("cuda", args[0])
        return host_tensors.call(func, name, args, dict(kwargs or {}))


_STREAM = Stream()
_MODE = CudaOnCpu()


def _answers() -> dict[str, Any]:
    """Returns the functions of `torch.cuda` that the actor, megatron-core and Transformer Engine call."""
    nothing, always = (lambda *args, **settings: None), (lambda *args, **settings: True)
    return dict(
        is_available=always, is_initialized=always, is_bf16_supported=always, can_device_access_peer=always,
        init=nothing, _lazy_init=nothing, empty_cache=nothing, set_device=nothing, ipc_collect=nothing,
        reset_peak_memory_stats=nothing, reset_max_memory_allocated=nothing, set_stream=nothing,
        manual_seed=lambda seed: torch.default_generator.manual_seed(seed), manual_seed_all=nothing, seed=nothing,
        is_current_stream_capturing=lambda: False, device_count=lambda: 8, current_device=lambda: 0,
        synchronize=lambda *device: Waits.count("device"), _lazy_call=lambda action, **settings: action(),
        current_stream=lambda *device: _STREAM, default_stream=lambda *device: _STREAM, Stream=Stream, Event=Event,
        stream=lambda stream: contextlib.nullcontext(), device=lambda device: contextlib.nullcontext(),
        get_device_properties=lambda *device: H100, get_device_capability=lambda *device: (9, 0),
        get_device_name=lambda *device: H100.name, get_arch_list=lambda: ["sm_90"], current_blas_handle=lambda: 0,
        memory_allocated=lambda *device: 0, max_memory_allocated=lambda *device: 0, memory_stats=lambda *device: {},
        memory_reserved=lambda *device: 0, max_memory_reserved=lambda *device: 0,
        cudart=lambda: RUNTIME, mem_get_info=lambda *device: (MEMORY, MEMORY),
        initial_seed=torch.initial_seed, get_rng_state=lambda *device, **settings: torch.get_rng_state(),
        set_rng_state=lambda state, *device, **settings: torch.set_rng_state(state),
    )  # fmt: skip


def _own(answer: Any) -> Any:
    """Returns a function of its own for each name: torch.compile keeps a table of functions, each with one name."""
    return lambda *args, **settings: answer(*args, **settings)


def _in_mode(function: Any) -> Any:
    def call(*args: Any, **settings: Any) -> Any:
        with CudaOnCpu():
            return function(*args, **settings)

    return functools.wraps(function)(call)


def _everywhere() -> None:
    """Enters the mode in this thread, in threads to come, and in what torch runs outside any mode: backward passes and
    operations written in Python."""
    from torch._library import custom_ops

    register = custom_ops.CustomOpDef.register_kernel
    bootstrap, run = threading.Thread._bootstrap_inner, torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def in_thread(self: threading.Thread) -> None:
        with CudaOnCpu():
            bootstrap(self)

    def register_kernel(self: Any, device_types: Any, function: Any = None, /) -> Any:
        if function is None:
            return lambda function: register_kernel(self, device_types, function)
        return register(self, device_types, _in_mode(function))

    threading.Thread._bootstrap_inner = in_thread  # type: ignore[attr-defined]
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = _in_mode(run)  # type: ignore
    custom_ops.CustomOpDef.register_kernel = register_kernel  # type: ignore[method-assign]
    _MODE.__enter__()


def _type(self: torch.Tensor, *args: Any, **settings: Any) -> Any:
    answer = _TYPE(self, *args, **settings)  # within the mode, torch finds this function again by its name
    if not isinstance(answer, str) or "cuda" in answer or not of_cuda(self):
        return answer
    return answer.replace("torch.", "torch.cuda.")


_TYPE = torch.Tensor.type


def install() -> None:
    cuda, tensor = torch.cuda, torch.Tensor
    for name, answer in _answers().items():
        answer = answer if isinstance(answer, type) else _own(answer)
        setattr(cuda, name, answer)
        if hasattr(cuda.random, name):
            setattr(cuda.random, name, answer)
    for name in ("from_numpy", "frombuffer", "get_rng_state"):  # no mode sees these
        setattr(torch, name, host_tensors.made_on_host(getattr(torch, name)))
    for kind in ("Float", "Half", "BFloat16", "Int", "Long", "Double", "Byte", "Bool"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(cuda.nvtx, name, lambda *args: 0)
    cuda.default_generators = (torch.default_generator,)
    cuda.nccl.version = lambda: (2, 27, 3)  # type: ignore[assignment]
    torch.version.cuda = "12.9"
    device = tensor.device.__get__
    tensor.device = property(lambda self: GPU if of_cuda(self) else device(self))  # type: ignore[assignment]
    tensor.is_cuda = property(lambda self: of_cuda(self) and not _in_lpreg())  # type: ignore[assignment]
    tensor.is_cpu = property(on_host)  # type: ignore[assignment]
    tensor.get_device = lambda self: 0 if of_cuda(self) else -1  # type: ignore[method-assign]
    tensor.type = _type  # type: ignore[method-assign, assignment]
    tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    tensor.is_pinned = lambda self, *device: on_host(self)  # type: ignore[method-assign]
    nccl_is_gloo.install()
    _everywhere()


def _in_lpreg() -> bool:
    """Returns whether lpreg asks, which would then choose Triton kernels: these need a real GPU."""
    return "/lpreg/" in sys._getframe(2).f_code.co_filename
