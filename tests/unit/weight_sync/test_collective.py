"""The broadcast between a sender and engines in processes of their own."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from datetime import timedelta
from itertools import cycle, islice
from multiprocessing.connection import Connection
from typing import Any

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
from megatron_rl.weight_sync.process_group import BroadcastGroup
from megatron_rl.weight_sync.transport import GroupMember, WeightsNotSent
from tests import ranks
from tests.patience import wait_until

LIMIT = 400
LONG = timedelta(hours=1)
"""Limit of what must not depend on how busy the machine is."""
NAMES = ("a.b.weight", "a.c.weight", "a.d.weight")


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [(name, torch.randn(30 + i, 2)) for i, name in enumerate(NAMES)]


def member(port: int, rank: int, size: int, timeout_seconds: float) -> GroupMember:
    return GroupMember("weights-test-0", LOOPBACK, port, "gloo", size, rank, timeout_seconds)


def engine(mine: GroupMember, buckets_to_take: int, then: str, answer: Connection) -> None:
    """A process that receives a number of buckets, update after update. Like an engine, it has a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=LONG)
    group = process_group.join(mine)
    received: dict[str, str] = {}
    specs = [TensorSpec.of(name, tensor) for name, tensor in tensors()]
    for bucket in islice(cycle(bucket_specs(specs, LIMIT)), buckets_to_take):
        flat = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8)
        dist.broadcast(flat, group=group, group_src=0)
        received |= {name: digest(tensor) for name, tensor in unflatten(flat, bucket)}
    answer.send(received)
    if then == "leave":
        process_group.leave(group)
        del group  # the connections close when the group is freed
    if then != "end":
        threading.Event().wait()


def run(
    buckets_to_take: list[int], timeout_seconds: float = LONG.total_seconds(), then: str = "end"
) -> tuple[CollectiveTransport, list[Any]]:
    """Start a sender and engines. then: what the first engine does afterwards: end, hang, or leave the group."""
    context = ranks.context()
    port, size = open_port(LOOPBACK), 1 + len(buckets_to_take)
    engines = []
    for rank, count in enumerate(buckets_to_take, start=1):
        ours, theirs = context.Pipe()
        mine, last = member(port, rank, size, timeout_seconds), then if rank == 1 else "end"
        process = context.Process(target=engine, args=(mine, count, last, theirs))
        process.start()
        engines.append((process, ours))
    transport = CollectiveTransport(member(port, 0, size, timeout_seconds), 0, LIMIT)
    transport.connect()
    return transport, engines


def end(engines: list[Any]) -> None:
    for process, _ in engines:
        process.kill()
        process.join()


def test_every_engine_receives_every_tensor() -> None:
    transport, engines = run([3, 3])
    try:
        pushed = transport.push(iter(tensors()), 7, ChecksumTaker(1))
        assert pushed.bytes == sum(tensor.nbytes for _, tensor in tensors())
        assert pushed.checksums and len(pushed.checksums.plain) == len(NAMES)
        for process, answer in engines:
            wait_until(answer.poll, [process.pid], "the engine's answer")
            assert answer.recv() == pushed.checksums.plain
    finally:
        transport.close()
        end(engines)


def test_the_next_bucket_is_collected_while_one_is_on_its_way() -> None:
    """The sender draws no tensor of a third bucket before the first one has arrived, as there are two buffers."""
    seen: list[str] = []

    class Group:
        def start(self, flat: torch.Tensor) -> None:
            seen.append("start")

        def finish(self) -> None:
            seen.append("finish")

    def drawn() -> Any:
        for name, tensor in tensors():
            seen.append(name)
            yield name, tensor

    transport = CollectiveTransport(member(1, 0, 2, 1.0), 0, LIMIT)
    transport._group = Group()  # type: ignore[assignment]
    transport.push(drawn(), 1)
    first, second, third = NAMES
    sending = [first, second, "finish", "start", third, "finish", "start", "finish", "start", "finish"]
    assert seen == sending


def test_an_engine_that_dies_during_an_update_is_noticed() -> None:
    transport, engines = run([3, 1])
    try:
        with pytest.raises(WeightsNotSent, match="sending weights of version 7 failed"):
            for _ in range(50):  # sent data may stay in buffers for a while
                transport.push(iter(tensors()), 7)
    finally:
        transport.close()
        end(engines)


@pytest.mark.parametrize("then", ["leave", "hang"])
def test_no_process_waits_for_an_engine_that_gave_up(then: str) -> None:
    """A hanging engine is waited for until the timeout, a leaving one is not. The other engine fails too."""
    transport, engines = run([1, 10_000], then=then)
    try:
        if then == "hang":  # shorten the sender's timeout, now that all have joined
            assert transport._group is not None and transport._group._group is not None
            transport._group._group.set_timeout(timedelta(seconds=1))
        with pytest.raises(WeightsNotSent, match="sending weights of version 7 failed"):
            for _ in range(50):
                transport.push(iter(tensors()), 7)
        (first, _), (second, _) = engines
        wait_until(lambda: not second.is_alive(), [second.pid], "the end of the second engine")
        assert second.exitcode and first.is_alive()  # an exception ended it
    finally:
        transport.close()
        end(engines)


def test_an_engine_that_does_not_join_is_noticed() -> None:
    transport = CollectiveTransport(member(open_port(LOOPBACK), 0, 2, 1.0), 0, LIMIT)
    with pytest.raises(WeightsNotSent, match="not all engines joined"):
        transport.connect()


def test_a_group_forms_on_the_oldest_torch_that_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.9 the name of a group had no type of its own."""
    monkeypatch.delattr("torch.distributed.distributed_c10d.GroupName", raising=False)
    group = process_group.join(member(open_port(LOOPBACK), 0, 1, 60.0))
    assert group.size() == 1
    process_group.leave(group)


class Work:
    """A broadcast over NCCL: it is done after a number of looks, or never."""

    def __init__(self, looks: int | None, success: bool = True) -> None:
        self.looks, self.success, self.waited = looks, success, False

    def is_completed(self) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks < 0

    def is_success(self) -> bool:
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")  # as torch's class does

    def wait(self) -> None:
        assert self.looks is not None and self.looks < 0, "it would wait for ever"
        if not self.success:
            raise RuntimeError("NCCL error: unhandled system error")
        self.waited = True


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a sender's group whose communicator is a stand-in. A real one needs GPUs; the group's store is real."""
    aborted: list[object] = []
    monkeypatch.setattr(process_group.c10d, "_abort_process_group", aborted.append)
    monkeypatch.setattr(process_group, "STORE_SECONDS", 0.01)

    def make(work: Work, limit: float = LONG.total_seconds()) -> tuple[BroadcastGroup, list[object]]:
        group = object()
        monkeypatch.setattr(process_group, "join", lambda member, index: group)
        monkeypatch.setitem(process_group.c10d._world.pg_map, group, ("nccl", dist.HashStore()))
        monkeypatch.setattr(process_group.dist, "broadcast", lambda *_, **__: work)
        return BroadcastGroup(replace(member(1, 0, 2, limit), backend="nccl")), aborted

    return make


def test_a_broadcast_over_nccl_ends_when_its_work_is_done(nccl: Any) -> None:
    work = Work(looks=3)
    group, aborted = nccl(work)
    group.broadcast(torch.zeros(1))
    assert work.waited and not aborted


@pytest.mark.parametrize(
    ("work", "message"),
    [(Work(None), r"took longer than 0\.05 s: a member hangs"), (Work(0, success=False), "NCCL error: unhandled")],
    ids=["hangs", "fails"],
)
def test_a_broadcast_over_nccl_that_cannot_end_is_aborted(nccl: Any, work: Work, message: str) -> None:
    group, aborted = nccl(work, limit=0.05)
    with pytest.raises(RuntimeError, match=message):
        group.broadcast(torch.zeros(1))
    assert len(aborted) == 1 and group._store.check([process_group.STOPPED])
    with pytest.raises(RuntimeError, match="closed after an earlier failure"):
        group.broadcast(torch.zeros(1))
    group.leave()
    assert len(aborted) == 1


def test_a_sender_over_nccl_is_stopped_from_another_thread(nccl: Any) -> None:
    group, aborted = nccl(Work(None))
    threading.Timer(0.05, group.stop).start()
    with pytest.raises(RuntimeError, match="stopped, since an engine failed"):
        group.broadcast(torch.zeros(1))
    assert len(aborted) == 1


def test_a_member_over_nccl_sees_that_another_one_has_failed(nccl: Any) -> None:
    group, aborted = nccl(Work(None))
    group._store.set(process_group.STOPPED, "")
    with pytest.raises(RuntimeError, match="another member of the broadcast has failed"):
        group.broadcast(torch.zeros(1))
    assert len(aborted) == 1


def test_torchs_watchdog_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads these variables as it makes a group; all other groups keep their watchdog."""
    seen: dict[str, Any] = {}

    def made(*_: Any, **named: Any) -> tuple[object, None]:
        seen.update(named, **{name: os.environ.get(name) for name in process_group._UNWATCHED})
        return object(), None

    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    monkeypatch.setattr(process_group.c10d, "_new_process_group_helper", made)
    monkeypatch.setattr(process_group, "store_at", lambda *_: dist.HashStore())
    process_group.join(replace(member(1, 0, 2, 5.0), backend="nccl"))
    assert seen.items() >= process_group._UNWATCHED.items() and seen["timeout"] > timedelta(seconds=5)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3" and "TORCH_NCCL_ENABLE_MONITORING" not in os.environ
