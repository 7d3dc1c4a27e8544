"""The device that the actor runs on. Only this module makes megatron-core, which is written for CUDA, run on CPU.

`torch.cpu` mirrors the part of `torch.cuda` that megatron-core calls (current_device, synchronize), and tensors have
`.cpu()` as they have `.cuda()`. One mechanism therefore covers nearly everything: in the functions listed in
`CUDA_SITES`, the name `cuda` and the constants "cuda" and "torch.cuda.<X>Tensor" are replaced by their CPU
counterparts. Random numbers are the exception: their CPU counterparts are in `torch.random`, and functions that use
CUDA's generators get another body. Nothing outside these functions changes. A replacement that finds nothing to replace
raises an error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.batching.packing import PackingForm
    from megatron_rl.config.actor import ActorSettings

SUPPORTED = ((0, 16), (0, 19))
"""Oldest and newest release line of megatron-core whose uses of CUDA are exactly those listed below."""

CUDA_SITES = {
    "rotary embedding": ("models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb",),
    "tied embeddings over pipeline stages": (
        "models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    ),
    "gathering logits": ("tensor_parallel.mappings:_gather_along_last_dim",),
    "sequence parallelism": (
        "tensor_parallel.mappings:_gather_along_first_dim",
        "tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        "tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward",
        "utils:GlobalMemoryBuffer.get_tensor",
    ),
    "schedules": (
        "pipeline_parallel.schedules:forward_backward_no_pipelining",
        "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
        "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
    ),
    "pipeline communication": (
        "pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",
        "pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
    ),
    "gradient buffers": (
        "distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__",
        "distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
    ),
    "optimizers": (
        "optimizer.optimizer:FP32Optimizer.__init__",
        "optimizer.optimizer:MixedPrecisionOptimizer.__init__",
        "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        "optimizer.optimizer:ChainedOptimizer.get_loss_scale",
        "optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        "optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
    ),
    "mixture of experts": (
        "transformer.moe.router:Router.gating",
        "transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "tensor_parallel.mappings:_AllToAll.forward",
    ),
    "gradient clipping": (
        "optimizer.clip_grads:get_grad_norm_fp32",
        "optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "utils:local_multi_tensor_l2_norm",
    ),
}
"""Purpose -> functions of megatron.core that name CUDA."""

NEWER_SITES = {(0, 19): ("optimizer.optimizer:MegatronOptimizer.has_grad_norm_group",)}
"""Release line -> further functions that name CUDA from that release on."""

RANDOM_SITES = (
    "tensor_parallel.random:CudaRNGStatesTracker.add",
    "tensor_parallel.random:model_parallel_cuda_manual_seed",
)
"""Functions that seed CUDA's generator or read its state under names that also exist in `torch.random`."""


def _get_rng_state(
    device: int | str | torch.device = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Returns the expert dispatcher's counts. Megatron's version converts only CUDA tensors to numpy."""
    return tensor.numpy() if as_numpy and tensor is not None else tensor


CPU_TWINS: dict[str, Callable[..., Any]] = {
    "transformer.moe.moe_utils:maybe_move_tensor_to_cpu": _on_host,
    "tensor_parallel.random:_get_cuda_rng_state": _get_rng_state,
    "tensor_parallel.random:_set_cuda_rng_state": _set_rng_state,
}
"""Functions of megatron.core whose entire body is replaced."""

_device: torch.device | None = None
"""The device that `prepare` chose."""


def prepare(device: str) -> torch.device:
    """Returns the device that this process trains on, with megatron-core prepared for it. Call before building a model.

    `device` is "auto" (CUDA if available), "cpu" or "cuda". On CUDA the process uses the GPU that LOCAL_RANK names.
    Raises UserError if CUDA is requested but absent, or if this version of megatron-core is not known to run on CPU.
    """
    global _device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        _check_version()
        _run_on_cpu()
        _device = torch.device("cpu")
        return _device
    if not torch.cuda.is_available():
        raise UserError("actor.device is 'cuda', but torch sees no GPU. Use 'cpu' or 'auto', or a CUDA build of torch.")
    _device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(_device)
    return _device


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether layers come from Transformer Engine, which runs on CUDA only.

    In fp32 they do not, because Transformer Engine has no fp32 attention for packed sequences.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    return device.type == "cuda" and dtype != torch.float32 and installed


def packing_form(settings: ActorSettings, device: torch.device) -> PackingForm:
    """Returns how the sequences of a micro-batch are packed. Transformer Engine's attention supports no prefix tree."""
    if settings.rows != "auto":
        return settings.rows
    return "packed" if uses_transformer_engine(device, getattr(torch, settings.dtype)) else "prefix_tree"


def require(device: torch.device, settings: ActorSettings) -> None:
    """Raises UserError if the settings need Transformer Engine without it, or do not work with it."""
    wanted = {
        f"actor.context_parallel: {settings.context_parallel}": settings.context_parallel > 1,
        f"actor.fp8: {settings.fp8}": settings.fp8 != "none",
        f"actor.expert_gemm: {settings.expert_gemm}": settings.expert_gemm == "grouped",
    }
    engine = uses_transformer_engine(device, getattr(torch, settings.dtype))
    if engine and settings.rows == "prefix_tree":
        raise UserError(
            "actor.rows: prefix_tree does not work with Transformer Engine, which is installed: its attention does not "
            "support sequences that share positions. Set actor.rows to auto or packed"
        )
    for key, asked in wanted.items():
        if asked and not engine:
            raise UserError(
                f"{key} needs Transformer Engine, which must be installed and is used on CUDA only and in bfloat16. "
                "Install it and set actor.dtype to bfloat16, or set context_parallel to 1, fp8 to none and expert_gemm "
                "to auto"
            )


def describe(dtype: torch.dtype) -> str:
    """Returns one line for the log about a model of this dtype. Call after `prepare`."""
    if _device is None:
        raise RuntimeError("call prepare() first")
    layers = "Transformer Engine layers" if uses_transformer_engine(_device, dtype) else "local layers"
    apex = "Apex" if importlib.util.find_spec("apex") else "no Apex"
    return f"{_device}, megatron-core {megatron_version()}, {layers}, {apex}"


def device_name() -> str:
    """Returns the driver's name of the GPU, or "cpu". Call after `prepare`."""
    if _device is None:
        raise RuntimeError("call prepare() first")
    return torch.cuda.get_device_name(_device) if _device.type == "cuda" else "cpu"


def megatron_version() -> str:
    """Returns the installed version. Raises UserError if megatron-core is not installed."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"megatron-core is not installed. Run: {_install()}") from None


def _install() -> str:
    (first, newest), (_, last) = SUPPORTED
    return f'pip install "megatron-core>={first}.{newest},<{first}.{last + 1}"'


def _release_line() -> tuple[int, ...]:
    return tuple(int(part) for part in megatron_version().split(".")[:2])


def _check_version() -> None:
    oldest, newest = SUPPORTED
    if not oldest <= _release_line() <= newest:
        raise UserError(
            f"megatron-core {megatron_version()} is not known to run on CPU; known are {'.'.join(map(str, oldest))} to "
            f"{'.'.join(map(str, newest))}. Run: {_install()}, or use actor.device: cuda"
        )


@cache
def _run_on_cpu() -> None:
    """Runs once per process: a second time there would be nothing left to replace, which is an error."""
    newer = [sites for since, sites in NEWER_SITES.items() if _release_line() >= since]
    for site in itertools.chain(*CUDA_SITES.values(), *newer):
        _retarget(_find(site))
    for site in RANDOM_SITES:
        _retarget(_find(site), twin="random")
    for site, twin in CPU_TWINS.items():
        _replace(_find(site), twin)
    _adapt_experts()


def _adapt_experts() -> None:
    """Adds two names that the expert code needs on CPU.

    The expert dispatcher waits for an event of its stream, but `torch.cpu.Stream` has no events. The router tests
    whether `te_general_gemm` is None, but 0.16 defines that name only with Transformer Engine.
    """
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    if "te_general_gemm" not in moe_utils.RouterGatingLinearFunction.forward.__code__.co_names:
        raise RuntimeError("the router of megatron.core no longer uses te_general_gemm: megatron-core changed")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    class Stream(torch.cpu.Stream):
        def record_event(self) -> torch.cpu.Event:  # type: ignore[override]
            return torch.cpu.Event()

    dispatch = _find("transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize")
    if not hasattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream") or "record_event" not in dispatch.__code__.co_names:
        raise RuntimeError("the expert dispatcher of megatron.core no longer waits for an event: megatron-core changed")
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = Stream()


def _find(site: str) -> FunctionType:
    """Returns the function behind "module:Qualified.name" without decorators. Raises RuntimeError if it is missing."""
    module, _, qualified = site.partition(":")
    found: Any = importlib.import_module(f"megatron.core.{module}")
    for name in qualified.split("."):
        if not hasattr(found, name):
            raise RuntimeError(f"megatron.core.{module} has no {qualified}: megatron-core changed")
        found = getattr(found, name)
    function = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(function, FunctionType)
    return function


def _retarget(function: FunctionType, twin: str = "cpu") -> None:
    """Makes a function use `torch.<twin>` in place of CUDA. Raises RuntimeError if the function does not name CUDA."""
    changed = _without_cuda(function.__code__, twin)
    if changed == function.__code__:
        raise RuntimeError(f"{function.__module__}.{function.__qualname__} no longer names CUDA: megatron-core changed")
    function.__code__ = changed


def _replace(function: FunctionType, twin: Callable[..., Any]) -> None:
    """Gives a function another body. Raises RuntimeError if its parameters differ from those of the new body."""
    if list(inspect.signature(function).parameters) != list(inspect.signature(twin).parameters):
        raise RuntimeError(f"{function.__module__}.{function.__qualname__} has other arguments: megatron-core changed")
    function.__code__ = twin.__code__


def _without_cuda(constant: Any, twin: str) -> Any:
    """Returns a function's code, or one of its constants, with CUDA replaced, also within inner functions."""
    if isinstance(constant, CodeType):
        names = tuple(twin if name == "cuda" else name for name in constant.co_names)
        return constant.replace(co_names=names, co_consts=_without_cuda(constant.co_consts, twin))
    if isinstance(constant, str):
        if constant == "cuda":
            return "cpu"
        if constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
            return constant.replace("torch.cuda.", "torch.")
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_without_cuda(item, twin) for item in constant)
    return constant
