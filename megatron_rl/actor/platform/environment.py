"""Environment variables of the actor's ranks. They must be set before torch, CUDA and NCCL start.

What the user has set stays, and reaches the ranks on every node.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_rl.utils.nccl import AGREED

if TYPE_CHECKING:
    from megatron_rl.config.actor import ActorSettings

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of one setting; torch since 2.9 knows both."""
FP32_PRODUCTS = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
"""Overrides the user's environment, because NVIDIA's container sets 1."""

ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}
"""Of ranks on a CPU, where torch compiles nothing: megatron-core then imports without torch's compiler, in a fifth less
time."""


def rank_environment(settings: ActorSettings, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the variables of every rank on a GPU. given: the user's environment.

    - NCCL's settings on which the actor and the engines agree: `utils/nccl.py`.
    - CUDA_DEVICE_MAX_CONNECTIONS=1: Megatron relies on one queue, in which a collective of tensor or context
      parallelism starts before the matrix product that it overlaps with.
    - expandable_segments: micro-batches differ in length, which fragments torch's cache. Memory that engines map is not
      torch's (`weight_sync/device_memory.py`), so the setting does not concern it.
    - NVTE_FP8_BLOCK_SCALING_FP32_SCALES: FP8 blocks are scaled by any fp32 number, as engines do, rather than by powers
      of two.
    """
    chosen = dict(AGREED)
    allocator = [name for name in ALLOCATOR if name in given] or [ALLOCATOR[0]]
    chosen |= dict.fromkeys(allocator, "expandable_segments:True")
    if settings.tensor_parallel > 1 or settings.context_parallel > 1:
        chosen["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if settings.fp8 == "blockwise":
        chosen["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"
    if settings.deterministic:
        chosen |= {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return {name: given.get(name, value) for name, value in chosen.items()} | FP32_PRODUCTS


def describe(environment: Mapping[str, str], given: Mapping[str, str] = os.environ) -> str:
    """Returns one line for the log: the variables, with those that the user has set marked."""
    parts = [f"{name}={value}{' (yours)' if given.get(name) == value else ''}" for name, value in environment.items()]
    return f"environment of the ranks: {', '.join(parts)}"
