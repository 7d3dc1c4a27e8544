"""Ray's object store is small on a laptop; batches on GPUs need more, and Ray chooses a share of the memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.cluster import runtime
from megatron_rl.errors import UserError


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_size_is_limited_only_without_gpus(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    given: dict[str, Any] = {}

    def init(**options: Any) -> None:
        given.update(options)
        raise ConnectionError("no Ray here")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(runtime.ray, "init", init)
    placement: Any = SimpleNamespace(nodes=(0,), on_gpu=on_gpu, processes=lambda node: 2, gpus=lambda node: 2)
    with pytest.raises(UserError), runtime.ray_runtime(placement):
        pass
    assert ("object_store_memory" in given) is not on_gpu
