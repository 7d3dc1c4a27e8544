"""Broadcasts weights between processes with one GPU each, and compares the rate with a plain broadcast.

This test has not been run yet.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync import process_group
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs, unflatten
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.collective import CollectiveTransport
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.transport import GroupMember

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL allows one process per GPU: needs two GPUs"),
]

LAYERS, WIDTH = 16, 8192
"""2 GiB of bfloat16 in tensors of 128 MiB."""
BUCKET = 512 * 2**20


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(f"layers.{i}.weight", torch.randn(WIDTH, WIDTH, device="cuda").bfloat16()) for i in range(LAYERS)]


def receive(group: dist.ProcessGroup, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    received = {}
    for bucket in bucket_specs(specs, BUCKET):
        flat = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8, device="cuda")
        dist.broadcast(flat, group=group, group_src=0)
        received |= {name: tensor.clone() for name, tensor in unflatten(flat, bucket)}
    return received


def engine(member: GroupMember, specs: list[TensorSpec], answer: Connection) -> None:
    torch.cuda.set_device(1)
    group = process_group.join(member)
    received = receive(group, specs)
    answer.send({name: digest(tensor) for name, tensor in received.items()})
    flat = torch.empty(sum(spec.nbytes for spec in specs), dtype=torch.uint8, device="cuda")
    dist.broadcast(flat, group=group, group_src=0)
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
        link = seconds(lambda: dist.broadcast(flat, group=transport._group, group_src=0))
        ours_took = seconds(lambda: transport.push(iter(weights), 2))
        process.join(60)
        for name, took in (("link", link), ("transport", ours_took)):
            record_property(f"{name}_gigabytes_per_second", round(pushed.bytes / took / 1e9, 1))
            print(f"{name}: {pushed.bytes / took / 1e9:.1f} GB/s")
    finally:
        process.kill()
        transport.close()
