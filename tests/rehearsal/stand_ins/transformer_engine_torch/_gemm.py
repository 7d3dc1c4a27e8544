"""Matrix products. cuBLAS counts columns first: with transa, A [n, k] and B [m, k] give B Aᵀ [m, n]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._dtypes import torch_dtype


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool) -> Tensor:
    a, b = A.reshape(-1, A.shape[-1]).float(), B.reshape(-1, B.shape[-1]).float()
    return (b.t() if transb else b) @ (a.t() if transa else a)


def _plain(*tensors: Any, **unused: Any) -> None:
    """Raises NotImplementedError unless the tensors are plain and the named extras are unused."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise NotImplementedError(f"a matrix product of {type(tensor).__name__} has no stand-in")
    for name, value in unused.items():
        if value:
            raise NotImplementedError(f"a matrix product with {name} has no stand-in")


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    D: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Tensor | None]:
    """Returns [product, gradient of the bias, None, extra output]. With `accumulate` the product is added to D."""
    _plain(A, B, quantizer=quantizer, gelu=gelu, comm_overlap=comm_overlap, alpha=alpha != 1.0)
    if accumulate and beta not in (None, 1.0):
        raise NotImplementedError(f"a matrix product with beta {beta} has no stand-in")
    out = _product(A, transa, B, transb)
    if bias is not None and not grad:
        out = out + bias.float()
    if D is not None:
        D.copy_(D.float() + out.view_as(D) if accumulate else out.view_as(D))
        result = D
    else:
        result = out.to(torch_dtype(out_dtype) if out_dtype is not None else A.dtype)
        result = result if transb else result.reshape(*B.shape[:-1], result.shape[-1])
    bias_grad = B.reshape(-1, B.shape[-1]).float().sum(0).to(bias.dtype) if grad and bias is not None else None
    return [result, bias_grad, None, extra_output]


def te_general_grouped_gemm(
    A: list[Tensor],
    transa: bool,
    B: list[Tensor],
    transb: bool,
    D: list[Tensor],
    D_type: int,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: int,
    single_output: bool,
    pre_gelu_out: list[Tensor],
    grad: bool,
    workspace: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> list[Tensor]:
    """Writes one product per expert to D, or all of them one below the other to D[0] with `single_output`."""
    _plain(*A, *B, bias=any(one.numel() for one in bias), gelu=any(one.numel() for one in pre_gelu_out))
    products = [_product(a, transa, b, transb) for a, b in zip(A, B, strict=True)]
    if single_output:
        products, D = [torch.cat(products)], D[:1]
    for out, product in zip(D, products, strict=True):
        out.copy_(out.float() + product.view_as(out) if accumulate else product.view_as(out))
    return bias
