"""Many tensors travel in one copy, and arrive as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rl.actor.passes.copies import ALIGNMENT, to_device, to_host

ARRAYS = {
    "flags": np.array([True, False, True]),
    "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
    "none": np.zeros(0, dtype=np.float32),
    "bounds": np.array([0, 5], dtype=np.int32),
    "column": np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1],
}


def test_arrays_arrive_on_the_device_in_one_aligned_buffer() -> None:
    there = to_device(ARRAYS, torch.device("cpu"))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(there[name].numpy(), array)
        assert there[name].numpy().dtype == array.dtype
    base = there["flags"].untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == base for tensor in there.values())
    assert all((tensor.data_ptr() - base) % ALIGNMENT == 0 for tensor in there.values() if tensor.numel())


def test_tensors_arrive_on_the_host_with_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [
        torch.tensor(True),
        torch.randn(3, 2, dtype=torch.float64),
        torch.randn(4),
        torch.zeros(0),
        torch.arange(3),
    ]
    tensors.append(torch.randn(4, 4).t()[1:])
    calls: list[int] = []
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (calls.append(1), copy(self))[1])
    found = to_host(tensors)
    assert len(calls) == 1
    for array, tensor in zip(found, tensors, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype and array.shape == tuple(tensor.shape)
    assert to_host([]) == []
