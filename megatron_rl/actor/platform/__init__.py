"""The device that the actor runs on, and what the installed packages allow there.

`cpu.py` makes megatron-core run on a CPU; `gpu.py` chooses the fused kernels of a GPU; `environment.py` gives ranks
their environment variables.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from megatron_rl.actor.platform import cpu, gpu
from megatron_rl.errors import UserError
from megatron_rl.utils import versions

if TYPE_CHECKING:
    from megatron_rl.batching.packing import PackingForm
    from megatron_rl.config.actor import ActorSettings, AttentionBackend

UNTRIED = "which has not been run on a GPU yet"

_device: torch.device | None = None
"""The device that `prepare` chose."""


def prepare(device: str, *, deterministic: bool = False) -> torch.device:
    """Returns the device that this process trains on, with megatron-core prepared for it. Call before building a model.

    `device` is "auto" (CUDA if available), "cpu" or "cuda". On CUDA the process uses the GPU that LOCAL_RANK names.
    Raises UserError if CUDA is requested but absent, or if a package has a version that this release does not support.
    """
    global _device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("actor.device is 'cuda', but torch sees no GPU. Use 'cpu' or 'auto', or a CUDA build of torch.")
    megatron_version()
    optional = ("transformer-engine",) if device == "cuda" else ()
    if problems := versions.all_outside(("torch", "megatron-core", *optional)):
        raise UserError("\n".join(problems))
    cpu.name_general_gemm()
    if device == "cpu":
        cpu.run_on_cpu()
        _device = torch.device("cpu")
        return _device
    _device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(_device)
    gpu.prepare(deterministic)
    return _device


def uses_transformer_engine(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether layers come from Transformer Engine, which runs on CUDA only.

    In fp32 they do not, because Transformer Engine has no fp32 attention for packed sequences.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    return device.type == "cuda" and dtype != torch.float32 and installed


def packing_form(settings: ActorSettings, device: torch.device) -> PackingForm:
    """Returns how the sequences of a micro-batch are packed.

    With Transformer Engine, `auto` means packed until a GPU has judged FlexAttention over prefix trees, and prefix_tree
    means packed if there is no FlexAttention.
    """
    engine = uses_transformer_engine(device, getattr(torch, settings.dtype))
    if settings.rows == "auto":
        return "packed" if engine else "prefix_tree"
    if engine and settings.rows == "prefix_tree" and gpu.missing_flex(settings.attention_backend):
        return "packed"
    return settings.rows


def uses_flex(settings: ActorSettings, device: torch.device) -> bool:
    """Returns whether FlexAttention attends over prefix trees, in place of Transformer Engine's attention."""
    engine = uses_transformer_engine(device, getattr(torch, settings.dtype))
    return engine and packing_form(settings, device) == "prefix_tree"


def fusions(settings: ActorSettings, device: torch.device, *, experts: bool) -> gpu.Fusions:
    """Returns the fused kernels that the actor uses. experts: whether the model has experts.

    Raises UserError if a setting asks for a kernel that this machine or this actor cannot have.
    """
    return gpu.fusions(
        settings.fusions,
        device,
        engine=uses_transformer_engine(device, getattr(torch, settings.dtype)),
        experts=experts,
    )


def attention(settings: ActorSettings, device: torch.device) -> AttentionBackend:
    """Returns the attention backend, as `gpu.attention` chooses it."""
    engine = uses_transformer_engine(device, getattr(torch, settings.dtype))
    return gpu.attention(settings.attention_backend, engine=engine, deterministic=settings.deterministic)


def overlaps_grad_reduce(settings: ActorSettings, device: torch.device) -> bool:
    """Returns whether the sum of gradients over replicas starts during the last backward pass."""
    if settings.data_parallel * settings.context_parallel == 1:
        return False
    return device.type == "cuda" if settings.overlap_grad_reduce == "auto" else settings.overlap_grad_reduce


def require(device: torch.device, settings: ActorSettings) -> None:
    """Raises UserError if the settings need Transformer Engine without it, or do not work with it."""
    wanted = {
        f"actor.context_parallel: {settings.context_parallel}": settings.context_parallel > 1,
        f"actor.fp8: {settings.fp8}": settings.fp8 != "none",
        f"actor.expert_gemm: {settings.expert_gemm}": settings.expert_gemm == "grouped",
    }
    engine = uses_transformer_engine(device, getattr(torch, settings.dtype))
    for key, asked in wanted.items():
        if asked and not engine:
            raise UserError(
                f"{key} needs Transformer Engine, which must be installed and is used on CUDA only and in bfloat16. "
                "Install it and set actor.dtype to bfloat16, or set context_parallel to 1, fp8 to none and expert_gemm "
                "to auto"
            )
    gpu.check_attention(attention(settings, device), engine=engine)


def describe(settings: ActorSettings, *, experts: bool = False) -> str:
    """Returns lines for the log: device and packages, then on CUDA one line per choice. Call after `prepare`."""
    if _device is None:
        raise RuntimeError("call prepare() first")
    engine = uses_transformer_engine(_device, getattr(torch, settings.dtype))
    layers = "Transformer Engine layers" if engine else "local layers"
    apex = "Apex" if importlib.util.find_spec("apex") else "no Apex"
    lines = [f"{_device}, megatron-core {megatron_version()}, {layers}, {apex}"]
    if _device.type == "cuda":
        lines.append(
            f"torch {torch.__version__}, Transformer Engine {versions.installed('transformer-engine') or 'none'}"
        )
        backend, flex = attention(settings, _device), uses_flex(settings, _device)
        chosen = f"FlexAttention over prefix trees, {UNTRIED}" if flex else backend
        lines.append(f"attention: {chosen if engine else 'scaled dot product of torch'}")
        if settings.rows == "prefix_tree" and packing_form(settings, _device) == "packed":
            lines.append(f"actor.rows: packed, not prefix_tree: {gpu.missing_flex(settings.attention_backend)}")
        lines += fusions(settings, _device, experts=experts).lines()
        overlap = overlaps_grad_reduce(settings, _device)
        lines.append(f"sum of gradients overlaps the backward pass: {'on' if overlap else 'off'}")
        lines += gpu.deterministic_lines(settings.deterministic, backend, engine=engine and not flex)
    return "\n  ".join(lines)


def device_name() -> str:
    """Returns the driver's name of the GPU, or "cpu". Call after `prepare`."""
    if _device is None:
        raise RuntimeError("call prepare() first")
    return torch.cuda.get_device_name(_device) if _device.type == "cuda" else "cpu"


def release_memory() -> None:
    """Gives memory that torch has cached back to the GPU, for the engines that share it. Does nothing on a CPU."""
    if _device is not None and _device.type == "cuda":
        torch.cuda.empty_cache()


def megatron_version() -> str:
    """Returns the installed version. Raises UserError if megatron-core is not installed."""
    version = versions.installed("megatron-core")
    if version is None:
        raise UserError(f"megatron-core is not installed. Run: {versions.remedy('megatron-core')}")
    return version
