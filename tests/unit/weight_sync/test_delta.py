"""The broadcast of changed weights: exact for every bit, and whole weights where there is nothing to change."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.delta import Copies, DeltaReceiver, DeltaTransport, bits_of, checksum
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.transport import GroupMember, WeightsNotSent
from tests import ranks
from tests.patience import wait_until

LIMIT, HOUR = 400, 3600.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)


def random_bits(dtype: torch.dtype, count: int) -> Tensor:
    """Values with random bits, which may be NaN of any kind, infinities and zeros of both signs."""
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def transferred(sender: Copies, receiver: Copies, tensor: Tensor) -> tuple[Tensor, int | None]:
    """Returns what the receiver holds after a patch, and the number of places in it."""
    patch = sender.patch("w", tensor)
    bits = receiver.apply("w", patch)
    received = bits.view(tensor.dtype).view(tensor.shape)
    assert checksum(received) == patch.checksum
    return received, None if patch.places is None else patch.places.numel()


@given(dtype=st.sampled_from(DTYPES), count=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_every_bit_arrives(dtype: torch.dtype, count: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    sender, receiver = Copies(), Copies()
    first, other = random_bits(dtype, count), random_bits(dtype, count)
    second = torch.where(torch.rand(count) < share, bits_of(other), bits_of(first)).view(dtype)
    for tensor in (first, second, second, first):
        received, _ = transferred(sender, receiver, tensor)
        assert torch.equal(bits_of(received), bits_of(tensor))


def test_only_changes_are_sent_if_they_are_fewer_bytes() -> None:
    """NaN equals itself, and -0.0 is another weight than 0.0."""
    sender, receiver = Copies(), Copies()
    weights = torch.tensor([[float("nan"), 0.0, 1.0], [2.0, 3.0, 4.0]]).t().bfloat16()
    assert transferred(sender, receiver, weights)[1] is None
    assert transferred(sender, receiver, weights)[1] == 0
    weights[1, 0] = -0.0
    received, places = transferred(sender, receiver, weights)
    assert places == 1 and torch.signbit(received[1, 0])
    assert transferred(sender, receiver, weights + 1)[1] is None  # of two bytes each, all go whole


def test_memory_that_is_used_again_does_no_harm() -> None:
    """The actor gathers each tensor into the memory of the last one."""
    sender, receiver, memory = Copies(), Copies(), torch.ones(100)
    patch = sender.patch("w", memory)
    memory.zero_()
    assert receiver.apply("w", patch).view(torch.float32).eq(1).all()
    assert transferred(sender, receiver, torch.ones(100))[1] == 0


def test_changes_need_a_copy() -> None:
    sender = Copies()
    sender.patch("w", torch.ones(100))
    with pytest.raises(RuntimeError, match="no copy of w"):
        Copies().apply("w", sender.patch("w", torch.ones(100)))


# ---------------------------------------------------------------------- between processes


def tensors(version: int) -> list[tuple[str, Tensor]]:
    """Tensors of two dtypes in four buckets, in which every hundredth weight changes with the version."""
    torch.manual_seed(0)
    found = [(f"{i}.weight", torch.randn(30 + i, 3).to(dtype)) for i in range(6) for dtype in [DTYPES[2 * (i // 4)]]]
    for _, tensor in found:
        tensor.view(-1)[version::100] *= -3
    return found


def specs() -> tuple[tuple[TensorSpec, ...], ...]:
    return bucket_specs([TensorSpec.of(name, tensor) for name, tensor in tensors(0)], LIMIT)


def engine(member: GroupMember, spoilt_at: int | None, updates: int, answers: Connection) -> None:
    """A process that receives updates; its copy of a tensor is spoilt before one of them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=HOUR))
    receiver = DeltaReceiver(member, 0, torch.device("cpu"))
    for update in range(updates):
        if update == spoilt_at:
            receiver._held._bits["2.weight"][0] += 1
        received: dict[str, str] = {}
        try:
            for bucket in specs():
                with receiver.bucket(bucket) as coming:
                    received |= {name: digest(tensor) for name, tensor in coming}
        except RuntimeError as error:
            answers.send(str(error))
            break
        answers.send(received)
    receiver.close()


def run(spoilt: Sequence[int | None], updates: int) -> tuple[DeltaTransport, list[Any]]:
    context, port, size, engines = ranks.context(), open_port(LOOPBACK), 1 + len(spoilt), []
    members = [GroupMember("delta", LOOPBACK, port, "gloo", size, rank, HOUR, "delta") for rank in range(size)]
    for member, spoilt_at in zip(members[1:], spoilt, strict=True):
        ours, theirs = context.Pipe()
        process = context.Process(target=engine, args=(member, spoilt_at, updates, theirs))
        process.start()
        engines.append((process, ours))
    transport = DeltaTransport(members[0], 0, LIMIT)
    transport.connect()
    return transport, engines


def answer(engine: Any) -> Any:
    process, answers = engine
    wait_until(answers.poll, [process.pid], "the engine's answer")
    return answers.recv()


def test_engines_hold_what_was_sent_and_a_damaged_copy_is_noticed() -> None:
    """The first update sends all weights, the second a few. The third finds the damage, and no process waits."""
    transport, engines = run([None, 2], updates=3)
    whole = sum(tensor.nbytes for _, tensor in tensors(0))
    header = 16 * len(tensors(0))
    try:
        for version in (0, 1):
            pushed = transport.push(iter(tensors(version)), version, ChecksumTaker(1))
            assert pushed.checksums and len(pushed.checksums.plain) == 6
            assert pushed.bytes == whole + header if version == 0 else pushed.bytes < whole / 4
            for each in engines:
                assert answer(each) == pushed.checksums.plain
        with pytest.raises(WeightsNotSent, match="sending weights of version 2 failed"):
            for _ in range(50):  # sent data may stay in buffers for a while
                transport.push(iter(tensors(1)), 2)
        assert "2.weight differs from what was sent" in answer(engines[1])
        assert isinstance(answer(engines[0]), str)
    finally:
        transport.close()
        for process, _ in engines:
            process.kill()
            process.join()
