"""Broadcasts weights between processes with one GPU each, and compares the rate with a plain broadcast.

This test has not been run yet.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, unflatten
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.collective import CollectiveTransport
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.process_group import BroadcastGroup
from megatron_rl.weight_sync.transport import GroupMember, WeightsNotSent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.measured,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL allows one process per GPU: needs two GPUs"),
]

LAYERS, WIDTH = 16, 8192
"""2 GiB of bfloat16 in tensors of 128 MiB."""
BUCKET = 512 * 2**20


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(f"layers.{i}.weight", torch.randn(WIDTH, WIDTH, device="cuda").bfloat16()) for i in range(LAYERS)]


def receive(group: BroadcastGroup, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    received = {}
    for bucket in bucket_specs(specs, BUCKET):
        flat = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8, device="cuda")
        group.broadcast(flat)
        received |= {name: tensor.clone() for name, tensor in unflatten(flat, bucket)}
    return received


def engine(member: GroupMember, specs: list[TensorSpec], answer: Connection) -> None:
    torch.cuda.set_device(1)
    group = BroadcastGroup(member)
    received = receive(group, specs)
    answer.send({name: digest(tensor) for name, tensor in received.items()})
    flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8, device="cuda")
    group.broadcast(flat)
    receive(group, specs)
    torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_weights_arrive_unchanged_through_a_broadcast(record_property: Callable[[str, object], None]) -> None:
    torch.cuda.set_device(0)
    weights = tensors()
    specs = [TensorSpec.of(name, tensor) for name, tensor in weights]
    port = open_port(LOOPBACK)
    members = [GroupMember("weights", LOOPBACK, port, "nccl", 2, rank, timeout_seconds=60.0) for rank in range(2)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=engine, args=(members[1], specs, theirs))
    process.start()
    transport = CollectiveTransport(members[0], 0, BUCKET)
    try:
        transport.connect()
        pushed = transport.push(iter(weights), 1, ChecksumTaker(1))
        assert pushed.checksums and ours.poll(120)
        assert ours.recv() == pushed.checksums.plain
        flat = torch.empty(pushed.bytes, dtype=torch.uint8, device="cuda")
        assert transport._group is not None
        link = seconds(lambda: transport._group.broadcast(flat))  # type: ignore[union-attr]
        ours_took = seconds(lambda: transport.push(iter(weights), 2))
        process.join(60)
        for name, took in (("link", link), ("transport", ours_took)):
            record_property(f"{name}_gigabytes_per_second", round(pushed.bytes / took / 1e9, 1))
            print(f"{name}: {pushed.bytes / took / 1e9:.1f} GB/s")
    finally:
        process.kill()
        transport.close()


def dying_engine(member: GroupMember, specs: list[TensorSpec]) -> None:
    """Ends in the middle of an update, without a word."""
    torch.cuda.set_device(1)
    group = BroadcastGroup(member)
    receive(group, specs[: len(specs) // 2])
    os._exit(1)


def test_the_actor_survives_an_engine_that_dies_in_a_broadcast() -> None:
    """NCCL's kernel would wait on the GPU for ever. After the abort the GPU computes again."""
    torch.cuda.set_device(0)
    weights = tensors()
    specs = [TensorSpec.of(name, tensor) for name, tensor in weights]
    port = open_port(LOOPBACK)
    members = [GroupMember("dying", LOOPBACK, port, "nccl", 2, rank, timeout_seconds=20.0) for rank in range(2)]
    process = multiprocessing.get_context("spawn").Process(target=dying_engine, args=(members[1], specs))
    process.start()
    transport = CollectiveTransport(members[0], 0, BUCKET)
    transport.connect()
    with pytest.raises(WeightsNotSent, match="sending weights of version 1 failed"):
        transport.push(iter(weights), 1)
    process.join(60)
    transport.close()
    assert process.exitcode == 1
    assert torch.ones(1000, device="cuda").sum().item() == 1000
