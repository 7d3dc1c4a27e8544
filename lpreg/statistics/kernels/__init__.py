"""Triton row kernels behind `lpreg.statistics.rows`: the same functions, one read of the logits each."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lpreg.statistics.shard import on_gpu


def usable(logits: Tensor) -> bool:
    """Whether the kernels can read these logits: on a GPU, with Triton installed, contiguous rows, not fp64."""
    return logits.dtype != torch.float64 and logits.stride(1) == 1 and _triton() and on_gpu(logits)


@cache
def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def load() -> ModuleType:
    """Returns the module of the kernels, imported on first use, because Triton is not installed on every machine."""
    from lpreg.statistics.kernels import row_kernels

    return row_kernels
