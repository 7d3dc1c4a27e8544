"""Host copies keep their place, take exactly the memory they need, and are pinned for GPUs. CUDA is a stand-in."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.utils import host_memory
from megatron_rl.utils.host_memory import ALIGNMENT, PAGE, HostCopies


class Cudart:
    """Records which memory is pinned."""

    def __init__(self, status: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.status = status

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if not self.status:
            self.pinned[pointer] = size
        return self.status

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.pinned[pointer]
        return 0


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def tensors() -> dict[str, Tensor]:
    return {"weight": torch.randn(1000, 7), "half": torch.randn(33).bfloat16(), "count": torch.arange(5)}


def test_a_second_copy_overwrites_the_first_in_place() -> None:
    copies: HostCopies[str] = HostCopies()
    first = copies.copy(tensors())
    places = {name: copy.data_ptr() for name, copy in first.items()}
    wanted = tensors()
    second = copies.copy(wanted)
    assert {name: copy.data_ptr() for name, copy in second.items()} == places
    for name, tensor in wanted.items():
        assert torch.equal(second[name], tensor) and second[name].dtype == tensor.dtype


def test_pinned_memory_has_the_size_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    given: dict[str, Any] = {name: tensor.as_subclass(OnGpu) for name, tensor in tensors().items()}
    copies: HostCopies[str] = HostCopies()
    copies.copy(given)
    copies.copy(given)
    (size,) = cuda.pinned.values()
    assert copies.nbytes <= size < copies.nbytes + len(given) * ALIGNMENT + PAGE
    (pointer,) = cuda.pinned
    assert pointer % PAGE == 0
    del copies
    gc.collect()
    assert cuda.pinned == {}


def test_memory_that_cannot_be_pinned_still_holds_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(status=2))
    copies: HostCopies[str] = HostCopies()
    given = {"weight": torch.ones(3).as_subclass(OnGpu)}
    with pytest.warns(UserWarning, match="cannot pin"):
        found = copies.copy(given)
    assert found["weight"].tolist() == [1, 1, 1]
    assert host_memory._fits(found["weight"], torch.ones(3))
