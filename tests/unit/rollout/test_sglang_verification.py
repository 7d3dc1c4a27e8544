"""What SGLang reports of its weights, and when that can be compared with what was sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from megatron_rl.rollout.engines.interface import Address
from megatron_rl.rollout.engines.sglang.server import SglangServer
from megatron_rl.weight_sync.checksums import Checksums, NotComparable, WeightsDamaged
from megatron_rl.weight_sync.digest import digest, tile_hash

TENSOR = torch.arange(7.0)
BY_CPU = Checksums({}, {"0:model.norm.weight": digest(TENSOR)})
BY_GPU = Checksums({}, {"0:model.norm.weight": f"tiles:{tile_hash(TENSOR):016x}"})


def verify(monkeypatch: pytest.MonkeyPatch, sent: Checksums, reported: str, **settings: Any) -> int:
    server = SglangServer(Address("http://unused"))
    rank = {"parallelism_info": [{"tp_rank": 0}], "checksums": {"model.norm.weight": reported}}
    answers = {
        "/server_info": {"device": "cuda", "quantization": None, **settings},
        "/weights_checker": {"ranks": [rank]},
    }

    async def send(method: str, path: str, body: Any, timeout_seconds: float) -> Any:
        return answers[path]

    monkeypatch.setattr(server._http, "_send", send)
    return asyncio.run(server.verify_weights(4, sent, 1.0))


def test_a_server_on_a_gpu_is_compared_by_its_own_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(monkeypatch, BY_GPU, f"{tile_hash(TENSOR):016x}") == 1
    with pytest.raises(WeightsDamaged, match=r"1 of 1 tensors differ, the first is 0:model\.norm\.weight"):
        verify(monkeypatch, BY_GPU, f"{tile_hash(TENSOR + 1):016x}")


def test_a_server_on_a_cpu_reports_the_first_digits_of_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(monkeypatch, BY_CPU, digest(TENSOR).partition(":")[2][:16], device="cpu") == 1
    with pytest.raises(WeightsDamaged):
        verify(monkeypatch, BY_CPU, digest(TENSOR + 1).partition(":")[2][:16], device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp8"}, "SGLang has quantization=fp8"),
        ({"enable_dp_attention": True}, "SGLang has enable_dp_attention=True"),
        ({}, "the actor took checksums of the kind sha256, the engine of the kind tiles"),
    ],
)
def test_what_cannot_be_compared_is_neither_damage_nor_agreement(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    for reported in (digest(TENSOR).partition(":")[2][:16], "0" * 16):
        with pytest.raises(NotComparable, match=message):
            verify(monkeypatch, BY_CPU, reported, **settings)
