"""The fused rotary embedding. Legend: freqs [s, 1, 1, d2] angles of positions; the first d2 features are rotated."""

from __future__ import annotations

import torch
from torch import Tensor

from ._enums import NVTE_QKV_Format


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    angles = _angles(input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank)
    rotated, rest = input[..., : angles.shape[-1]].float(), input[..., angles.shape[-1] :]
    out = rotated * angles.cos() + _half_turned(rotated) * angles.sin()
    return torch.cat([out.to(input.dtype), rest], -1)


def fused_rope_backward(output_grads: Tensor, freqs: Tensor, *settings: object) -> Tensor:
    """Takes the other arguments of `fused_rope_forward`; before Transformer Engine 2.13 without `start_positions`."""
    start = () if len(settings) == 6 else (None,)
    angles = _angles(output_grads, freqs, *start, *settings)  # type: ignore[arg-type]
    grads, rest = output_grads[..., : angles.shape[-1]].float(), output_grads[..., angles.shape[-1] :]
    out = grads * angles.cos() - _half_turned(grads * angles.sin())
    return torch.cat([out.to(output_grads.dtype), rest], -1)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _angles(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Returns the angles of every position, in a shape that broadcasts over the input.

    Context-parallel rank r of n holds parts r and 2n - 1 - r of the 2n parts of each sequence.
    """
    if interleaved or start_positions is not None:
        raise NotImplementedError("a fused rotary embedding that is interleaved or starts late has no stand-in")
    format = NVTE_QKV_Format(int(qkv_format)).name
    if format == "NVTE_THD":
        assert cu_seqlens is not None
        lengths = [length // cp_size for length in cu_seqlens.diff().numpy()]
        places = torch.cat([_places(length, cp_size, cp_rank) for length in lengths])
        return freqs[places, 0]  # [t, 1, d2]
    length = input.shape[0 if format == "NVTE_SBHD" else 1]
    angles = freqs[_places(length, cp_size, cp_rank)]  # [s, 1, 1, d2]
    return angles if format == "NVTE_SBHD" else angles.transpose(0, 1)


def _places(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Returns the positions that a rank holds `length` of."""
    if cp_size == 1:
        return torch.arange(length)
    half = length // 2
    return torch.cat([torch.arange(half) + cp_rank * half, torch.arange(half) + (2 * cp_size - 1 - cp_rank) * half])
