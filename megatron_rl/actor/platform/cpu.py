"""Makes megatron-core, which is written for CUDA, run on a CPU, whatever else is installed.

`torch.cpu` mirrors the part of `torch.cuda` that megatron-core calls (current_device, synchronize), and tensors have
`.cpu()` as they have `.cuda()`. One mechanism therefore covers nearly everything: in the functions listed in
`CUDA_SITES`, the name `cuda` and the constants "cuda" and "torch.cuda.<X>Tensor" are replaced by their CPU
counterparts. Random numbers are the exception: their CPU counterparts are in `torch.random`, and functions that use
CUDA's generators get another body. Nothing outside these functions changes. A replacement that finds nothing to replace
raises an error.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch

from megatron_rl.utils import versions

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


def _local(name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("megatron.core.utils"), name)


TORCH_TWINS: dict[str, dict[str, Any]] = {
    "optimizer": {
        "Adam": lambda: torch.optim.AdamW,
        "SGD": lambda: torch.optim.SGD,
        "USING_PYTORCH_OPTIMIZER": True,
    },
    "optimizer.optimizer": {
        "multi_tensor_applier": _local("local_multi_tensor_applier"),
        "multi_tensor_scale_impl": _local("local_multi_tensor_scale"),
    },
    "optimizer.clip_grads": {
        "multi_tensor_applier": _local("local_multi_tensor_applier"),
        "multi_tensor_scale_impl": _local("local_multi_tensor_scale"),
        "l2_norm_impl": _local("local_multi_tensor_l2_norm"),
    },
    "optimizer.distrib_optimizer": {
        "HAVE_APEX_OR_TE": False,
        "USING_TE_OPTIMIZER": False,
        "USING_APEX_OPTIMIZER": False,
    },
    "transformer.moe.moe_utils": {"te_general_gemm": None},
    "transformer.attention": {"SplitAlongDim": None},
}
"""Module of megatron.core -> names that hold kernels of Transformer Engine or Apex if these are installed, and what the
names hold without them; a function makes the value."""


@cache
def run_on_cpu() -> None:
    """Retargets megatron-core, once per process: a second time nothing would be left to replace, which is an error."""
    newer = [sites for since, sites in NEWER_SITES.items() if _release_line() >= since]
    for site in itertools.chain(*CUDA_SITES.values(), *newer):
        _retarget(_find(site))
    for site in RANDOM_SITES:
        _retarget(_find(site), twin="random")
    for site, twin in CPU_TWINS.items():
        _replace(_find(site), twin)
    _use_torch()
    _adapt_experts()


def _release_line() -> tuple[int, ...]:
    return tuple(int(part) for part in (versions.installed("megatron-core") or "0.0").split(".")[:2])


def _use_torch() -> None:
    """Makes megatron-core use torch where it would use kernels of Transformer Engine or Apex, which need a GPU."""
    for module, names in TORCH_TWINS.items():
        found = importlib.import_module(f"megatron.core.{module}")
        for name, twin in names.items():
            if not hasattr(found, name):
                raise RuntimeError(f"megatron.core.{module} has no {name}: megatron-core changed")
            setattr(found, name, twin() if callable(twin) else twin)


def name_general_gemm() -> None:
    """Defines `te_general_gemm`: the router tests whether it is None, but 0.16 lacks it without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    if "te_general_gemm" not in moe_utils.RouterGatingLinearFunction.forward.__code__.co_names:
        raise RuntimeError("the router of megatron.core no longer uses te_general_gemm: megatron-core changed")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _adapt_experts() -> None:
    """Gives the expert dispatcher a stream with events, for which it waits: `torch.cpu.Stream` has none."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

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
