"""Copies between host and device, many tensors at a time: a copy that the host waits for holds up the whole GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: the start of each array in a common buffer is a multiple of this, as kernels read that many at once."""


def to_device(arrays: Mapping[str, npt.NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Returns the arrays as tensors on the device, which share one buffer. The host does not wait for the copy."""
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    starts, size = {}, 0
    for name, array in held.items():
        starts[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    into = buffer.numpy()
    for name, array in held.items():
        into[starts[name] : starts[name] + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = buffer.to(device, non_blocking=True)
    return {
        name: moved[starts[name] : starts[name] + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for name, array in held.items()
    }


def to_host(tensors: Sequence[Tensor]) -> list[npt.NDArray[Any]]:
    """Returns tensors of one device as arrays, in the given order, with a single copy."""
    if not tensors:
        return []
    # In one buffer the widest types come first, so that each tensor starts at a multiple of its element's size.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    parts = [tensors[place].detach().contiguous().view(-1).view(torch.uint8) for place in order]
    copies = torch.cat(parts).cpu().split([part.numel() for part in parts])
    found = {
        place: copy.view(tensors[place].dtype).view(tensors[place].shape).numpy()
        for place, copy in zip(order, copies, strict=True)
    }
    return [found[place] for place in range(len(tensors))]
