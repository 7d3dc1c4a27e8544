"""The fused kernels of a GPU, and how the process uses it. Each choice is `auto` in the configuration and can be off.

No choice changes what is computed beyond rounding. tests/rehearsal runs them without a GPU, as far as that goes; their
speed has not been measured on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.config.kernels import missing_attention, missing_fusion
from megatron_rl.errors import UserError
from megatron_rl.utils import versions

if TYPE_CHECKING:
    from megatron_rl.config.actor import AttentionBackend, FusionSettings

ATTENTION = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}
"""Backend -> values of ATTENTION_VARIABLES that megatron-core sets, and insists on if they are set already."""
REPEATABLE_FLASH = ">=2.4.1"
"""Releases of flash-attn whose backward pass can repeat its bits."""
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


@dataclass(frozen=True, slots=True)
class Fusions:
    """Fused kernels, by the names of `FusionSettings`."""

    rope: bool = False
    swiglu: bool = False
    gradient_accumulation: bool = False
    expert_permutation: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of TransformerConfig.

        `gradient_accumulation_fusion` stays off there: the LM head would insist on Apex, though its forward never runs.
        `fuse_gradient_accumulation` sets it in the layers.
        """
        return {
            "apply_rope_fusion": self.rope,
            "bias_activation_fusion": self.swiglu,
            "moe_permute_fusion": self.expert_permutation,
            "gradient_accumulation_fusion": False,
        }

    def lines(self) -> list[str]:
        """Returns one line per kernel for the log."""
        return [f"actor.fusions.{name}: {'on' if getattr(self, name) else 'off'}" for name in self.__slots__]


NO_FUSIONS = Fusions()


def fusions(settings: FusionSettings, device: torch.device, *, engine: bool, experts: bool) -> Fusions:
    """Returns the fused kernels to use. engine: whether layers come from Transformer Engine.

    Raises UserError if a setting is true and its kernel is not available.
    """
    compiles = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    there = {
        "rope": engine,
        "swiglu": compiles,
        "gradient_accumulation": engine,
        "expert_permutation": engine and experts,
    }
    chosen = {}
    for name, available in there.items():
        wanted = getattr(settings, name)
        if wanted is True and not available:
            raise UserError(missing_fusion(name))
        chosen[name] = available if wanted == "auto" else wanted
    return Fusions(**chosen)


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Makes Transformer Engine's layers add weight gradients to the fp32 `main_grad` within their matrix products.

    Raises RuntimeError if no layer knows this, as Transformer Engine must have changed then.
    """
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    if not layers:
        raise RuntimeError("no layer has fuse_wgrad_accumulation: Transformer Engine changed")
    for layer in layers:
        layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def attention(backend: AttentionBackend, *, engine: bool, deterministic: bool) -> AttentionBackend:
    """Returns the attention backend to use. engine: whether layers come from Transformer Engine.

    `auto` is `flash` if results must repeat bit by bit and FlashAttention can do that. On Hopper, the repeatable
    backward pass of cuDNN, which would be chosen, needs about 128 bytes x sequences x heads x length^2 of memory:
    128 GiB for one sequence of 10,000 tokens and 10 heads. Source: Transformer Engine 2.20, `get_attention_backend`,
    which avoids cuDNN in this case; releases before do not.
    """
    if engine and deterministic and backend == "auto":
        version = versions.installed("flash-attn")
        if version is not None and versions.fits(version, REPEATABLE_FLASH):
            return "flash"
    return backend


def check_attention(backend: AttentionBackend, *, engine: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError if the attention backend does not suit the layers, or if environment variables contradict it."""
    if not engine:
        if missing := missing_attention(backend):
            raise UserError(missing)
        return
    if backend == "local":
        raise UserError(
            "actor.attention_backend: local means attention without Transformer Engine, whose layers this actor uses. "
            "Set it to auto, flash, fused or unfused"
        )
    for name, value in zip(ATTENTION_VARIABLES, ATTENTION[backend], strict=True):
        if environment.get(name, value) != value:
            raise UserError(
                f"{name}={environment[name]} is set in the environment, but actor.attention_backend: {backend} needs "
                f"{value}, and megatron-core refuses the difference. Unset {', '.join(ATTENTION_VARIABLES)} and choose "
                "with actor.attention_backend: auto, flash, fused or unfused"
            )


def missing_flex(backend: AttentionBackend) -> str | None:
    """Returns why FlexAttention cannot attend over prefix trees in Transformer Engine's layers; None if it can."""
    if backend != "auto":
        return f"actor.attention_backend: {backend} asks for an attention that has no prefix trees"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles FlexAttention, is not installed"
    return None


def prepare(deterministic: bool) -> None:
    """Sets up this process. Call before kernels are compiled.

    NVIDIA's container turns TF32 on for fp32 products (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), and fp32 here means fp32.
    """
    torch.set_float32_matmul_precision("highest")
    if deterministic:
        torch.use_deterministic_algorithms(True)


def deterministic_lines(deterministic: bool, attention: AttentionBackend, *, engine: bool) -> list[str]:
    if not deterministic:
        return []
    lines = ["deterministic: kernels and sums give the same bits when a run is repeated"]
    if engine and attention == "auto":
        lines.append(
            f"deterministic: without flash-attn{REPEATABLE_FLASH}, the backward pass of cuDNN's attention needs about "
            "128 bytes x sequences x heads x length^2 of memory on a Hopper GPU"
        )
    return lines
