"""The order of buckets from several stages, and digests that are taken beside other work."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from megatron_rl.weight_sync import digest_queue
from megatron_rl.weight_sync.buckets import TensorSpec
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.digest_queue import DigestQueue, digests
from megatron_rl.weight_sync.transport import CollectiveUpdate, StageBuckets


def test_stages_take_turns_and_each_keeps_its_own_order() -> None:
    def buckets(*names: str) -> tuple[tuple[TensorSpec, ...], ...]:
        return tuple((TensorSpec(name, "float32", (2,)),) for name in names)

    update = CollectiveUpdate(3, (StageBuckets("s0", buckets("a", "b", "c")), StageBuckets("s1", buckets("d"))))
    assert [(group, bucket[0].name) for group, bucket in update.portions()] == [
        ("s0", "a"),
        ("s1", "d"),
        ("s0", "b"),
        ("s0", "c"),
    ]


def test_a_senders_checksums_are_those_of_what_it_sent_though_memory_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No digest is taken before the memory holds something else."""
    overwritten = threading.Event()

    def late(tensor: torch.Tensor) -> str:
        assert overwritten.wait(60)
        return digest(tensor)

    monkeypatch.setattr(digest_queue, "digest", late)
    taker, memory, expected = ChecksumTaker(1), torch.empty(8, 8), {}
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.norm.weight"):
        memory.normal_()
        expected[name] = digest(memory)
        taker.add(name, memory)
    memory.zero_()
    overwritten.set()
    assert taker.result().plain == expected


def test_the_queue_waits_when_too_much_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(digest_queue, "PENDING_BYTES", 100)
    monkeypatch.setattr(digest_queue, "digest", lambda tensor: taken.append(tensor) or "sha256:0")
    queue = DigestQueue()
    for number in range(1, 11):
        queue.add(torch.zeros(40, dtype=torch.uint8))
        assert number - len(taken) <= 2
    assert queue._bytes <= 100


def test_an_error_while_taking_a_digest_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: torch.Tensor) -> str:
        raise ValueError("told to fail")

    monkeypatch.setattr(digest_queue, "digest", fails)
    with pytest.raises(ValueError, match="told to fail"):
        digests([("a", torch.zeros(1))])
