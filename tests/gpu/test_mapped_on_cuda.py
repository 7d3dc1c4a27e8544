"""Transfers weights through GPU memory that an engine's process has mapped, and compares the rate with a device copy.

This test has not been run yet.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.mapped import MappedReceiver, MappedTransport
from megatron_rl.weight_sync.transport import GroupMember

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.measured,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LAYERS, WIDTH = 16, 8192
"""2 GiB of bfloat16 in tensors of 128 MiB, plus one tensor of 640 MiB."""
BUCKET = 512 * 2**20
UPDATES = 3
"""Number of updates. The first is compared, the last is timed."""


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    named = [(f"layers.{i}.weight", torch.randn(WIDTH, WIDTH, device="cuda").bfloat16()) for i in range(LAYERS)]
    return [*named, ("head", torch.randn(5 * WIDTH, WIDTH, device="cuda").bfloat16())]


def engine(member: GroupMember, specs: list[TensorSpec], device: str, answer: Connection) -> None:
    """Keeps the weights it receives, as an engine does."""
    own = torch.device(device)
    torch.cuda.set_device(own)
    held = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=own) for spec in specs}
    receiver = MappedReceiver(member, 0, own)
    for update in range(UPDATES):
        for bucket in bucket_specs(specs, BUCKET):
            with receiver.bucket(bucket) as incoming:
                for name, tensor in incoming:
                    held[name].copy_(tensor)
                torch.cuda.synchronize(own)
        answer.send({name: digest(tensor) for name, tensor in held.items()} if update == 0 else "done")
    receiver.close()
    answer.send("closed")


def gigabytes_per_second(nbytes: int, work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return nbytes / (time.perf_counter() - start) / 1e9


def plain_copy(weights: list[tuple[str, torch.Tensor]], device: str) -> float:
    """Returns the rate of a plain copy into memory that is already allocated, in GB/s."""
    places = [torch.empty_like(tensor, device=device) for _, tensor in weights]

    def copy() -> None:
        for place, (_, tensor) in zip(places, weights, strict=True):
            place.copy_(tensor)
        torch.cuda.synchronize(device)

    copy()
    return gigabytes_per_second(sum(place.nbytes for place in places), copy)


def answered(connection: Connection) -> object:
    assert connection.poll(120), "the engine does not answer"
    return connection.recv()


@pytest.mark.parametrize(
    "device",
    [
        "cuda:0",
        pytest.param("cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
    ],
)
def test_weights_arrive_unchanged_through_mapped_memory(
    device: str, record_property: Callable[[str, object], None]
) -> None:
    """Sends to a process on the same GPU and to one on another GPU."""
    torch.cuda.set_device(0)
    weights = tensors()
    specs = [TensorSpec.of(name, tensor) for name, tensor in weights]
    port = open_port(LOOPBACK)
    members = [GroupMember("mapped", LOOPBACK, port, "gloo", 2, rank, 120.0, "cuda_ipc") for rank in range(2)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=engine, args=(members[1], specs, device, theirs))
    process.start()
    theirs.close()
    transport = MappedTransport(members[0], 0, BUCKET, torch.device("cuda:0"))
    free = torch.cuda.mem_get_info()[0]
    try:
        transport.connect()
        pushed = transport.push(iter(weights), 1, ChecksumTaker(1))
        assert pushed.checksums and answered(ours) == pushed.checksums.plain
        rates = {"device_to_device": plain_copy(weights, device)}
        transport.push(iter(weights), 2)
        assert answered(ours) == "done"
        rates["mapped"] = gigabytes_per_second(pushed.bytes, lambda: transport.push(iter(weights), 3))
        assert answered(ours) == "done" and answered(ours) == "closed"
        for name, rate in rates.items():
            record_property(f"{name}_gigabytes_per_second", round(rate, 1))
            print(f"{name}, to {device}: {rate:.1f} GB/s")
    finally:
        transport.close()
        process.kill()
        process.join()
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > free - 2**28, "the memory was not freed"
