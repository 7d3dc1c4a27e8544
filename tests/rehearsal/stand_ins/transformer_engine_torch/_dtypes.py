"""Transformer Engine's numbers for data types."""

from __future__ import annotations

import enum

import torch


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def torch_dtype(dtype: int) -> torch.dtype:
    """Returns the type of an unquantised tensor. Raises NotImplementedError for FP8 and FP4."""
    if int(dtype) not in _TORCH:
        raise NotImplementedError(f"transformer_engine_torch: {DType(int(dtype)).name} has no stand-in")
    return _TORCH[int(dtype)]
