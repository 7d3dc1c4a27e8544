"""A replica without sequences must not leave the others waiting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_rl.actor.passes.schedule import run_schedule
from megatron_rl.batching.partition import partition


@pytest.mark.parametrize("backward", [True, False])
def test_a_replica_without_sequences_still_adds_its_gradients(backward: bool) -> None:
    shares = partition([5, 4], 4, token_budget=100)
    assert [len(share) for share in shares].count(0) == 2
    reduced: list[Any] = []
    model = nn.Module()
    model.ddp_config = SimpleNamespace(overlap_grad_reduce=False)  # type: ignore[assignment]
    model.config = SimpleNamespace(finalize_model_grads_func=reduced.extend)  # type: ignore[assignment]
    assert run_schedule([model], [], lambda *_: (torch.zeros(()), None), backward=backward) == []
    assert reduced == ([model] if backward else [])
