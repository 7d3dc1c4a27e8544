"""Prints the hashes of tensors by SGLang's own GPU kernels, which Triton's interpreter runs on a CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import torch
from torch import Tensor


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, as SGLang's function demands."""

    is_cuda = True


def tensors() -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)
    for count in (1, 2, 3, 255, 8192, 8193, 20_001):
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{count} of {dtype}", torch.randn(count).to(dtype)
    yield "33 bytes", torch.arange(33, dtype=torch.uint8)
    yield "a transposed matrix", torch.randn(5, 7).t()
    yield "a matrix", torch.randn(100, 333).bfloat16()
    yield "zeros", torch.zeros(9000)
    yield "nothing", torch.zeros(0, 4)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when SGLang defines its kernels
    from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

    hashes = {name: gpu_tensor_hash(tensor.as_subclass(OnGpu)) for name, tensor in tensors()}
    print("hashes:", json.dumps(hashes))
