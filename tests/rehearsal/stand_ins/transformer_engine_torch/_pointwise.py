"""RMSNorm and SwiGLU, in fp32 within."""

from __future__ import annotations

from typing import Any

from torch import Tensor, rsqrt
from torch.nn.functional import silu

from ._dtypes import torch_dtype


def _no(quantizer: Any) -> None:
    if quantizer is not None:
        raise NotImplementedError(f"{type(quantizer).__name__} has no stand-in")


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor | None]:
    """Returns [output, None, 1 / root mean square [rows]]."""
    _no(quantizer)
    rows = input.float()
    scale = rsqrt(rows.square().mean(-1) + eps)
    out = (rows * scale[..., None] * (weight.float() + zero_centered_gamma)).to(torch_dtype(otype))
    return [out if ln_out is None else ln_out.copy_(out), None, scale]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """Returns the gradients of input and weight."""
    grad, normal = dz.float(), x.float() * rsigma[..., None]
    scaled = grad * (gamma.float() + zero_centered_gamma)
    dx = rsigma[..., None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (grad * normal).flatten(0, -2).sum(0).to(gamma.dtype)]


def swiglu(input: Tensor, quantizer: Any) -> Tensor:
    _no(quantizer)
    gate, up = input.float().chunk(2, -1)
    return (silu(gate) * up).to(input.dtype)


def dswiglu(grad: Tensor, input: Tensor, quantizer: Any) -> Tensor:
    _no(quantizer)
    (gate, up), grad = input.float().chunk(2, -1), grad.float()
    sigmoid = gate.sigmoid()
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return _joined(dgate, grad * gate * sigmoid).to(input.dtype)


def _joined(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])
    out[..., : gate.shape[-1]], out[..., gate.shape[-1] :] = gate, up
    return out
