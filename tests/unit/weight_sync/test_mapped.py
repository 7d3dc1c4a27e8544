"""Weights through mapped memory, between senders and engines in processes of their own; host memory without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rl.rollout.engines.interface import LOOPBACK
from megatron_rl.utils.rendezvous import open_port
from megatron_rl.weight_sync import cuda_runtime, device_memory
from megatron_rl.weight_sync.buckets import TensorSpec, bucket_specs
from megatron_rl.weight_sync.checksums import ChecksumTaker
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.folder import PREFIX
from megatron_rl.weight_sync.mapped import MappedReceiver, MappedTransport
from megatron_rl.weight_sync.transport import GroupMember, WeightsNotSent
from tests import ranks
from tests.patience import wait_until
from tests.unit.weight_sync import cuda_stand_in

LIMIT = 400
"""Bytes of each half, and of a bucket of several tensors."""
CPU = torch.device("cpu")
WAIT = 3600.0
"""Limit in seconds of what must not depend on how busy the machine is."""


def tensors(stage: int) -> list[tuple[str, torch.Tensor]]:
    """Tensors of six buckets. One tensor takes three portions, one is not contiguous, and two have another dtype."""
    torch.manual_seed(stage)
    shapes = [(30, 2), (31, 2), (20, 1), (20, 2), (125, 2), (3, 3)]
    named = [(f"{stage}.{i}.weight", torch.randn(shape)) for i, shape in enumerate(shapes)]
    named.append((f"{stage}.turned", torch.randn(5, 7).t()))
    return [*named, (f"{stage}.half", torch.randn(11).bfloat16()), (f"{stage}.odd", torch.randn(3, 5).bfloat16())]


def specs(stage: int) -> tuple[tuple[TensorSpec, ...], ...]:
    return bucket_specs([TensorSpec.of(name, tensor) for name, tensor in tensors(stage)], LIMIT)


@dataclass
class Engine:
    process: BaseProcess
    answers: Connection


def take(receivers: list[MappedReceiver], failure: str) -> Any:
    """Receive an update. Returns the checksums of the tensors, or why it failed."""
    received: dict[str, str] = {}
    try:
        for stage, receiver in enumerate(receivers):
            for number, bucket in enumerate(specs(stage)):
                with receiver.bucket(bucket) as coming:
                    for name, tensor in coming:
                        received[name] = digest(tensor)
                    if (stage, number) == (0, 2):
                        if failure == "dies":
                            os._exit(1)
                        if failure == "fails":
                            raise ValueError("the tensor does not fit")
    except (RuntimeError, ValueError) as error:
        return str(error)
    return received


def engine(members: list[GroupMember], failure: str, updates: int, stand_in: str | None, answers: Connection) -> None:
    """A process of an engine, with a process group of its own as engines have."""
    if stand_in is not None:
        cuda_stand_in.take_over(Path(stand_in))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=WAIT))
    if failure == "no room":
        device_memory.HostMemory.__init__ = no_room  # type: ignore[method-assign]
    try:
        receivers = [MappedReceiver(member, 0, CPU) for member in members]
    except (RuntimeError, OSError) as error:
        answers.send(str(error))
        return
    for _ in range(updates):
        answers.send(take(receivers, failure))
    for receiver in receivers:
        receiver.close()
    answers.send("closed")


def no_room(*_: object) -> None:
    raise OSError("no room to map it")


@contextmanager
def processes(
    failures: list[str], stages: int = 1, updates: int = 1, seconds: float = WAIT, device: torch.device = CPU
) -> Iterator[tuple[list[MappedTransport], list[Engine]]]:
    """Senders that have not connected yet, and engines that wait for them."""
    context, stand_in = ranks.context(), os.environ.get(cuda_stand_in.FOLDER)
    ports, engines = [open_port(LOOPBACK) for _ in range(stages)], []

    def members(rank: int) -> list[GroupMember]:
        size = 1 + len(failures)
        return [
            GroupMember(f"mapped-{stage}-{port}", LOOPBACK, port, "gloo", size, rank, seconds, "cuda_ipc")
            for stage, port in enumerate(ports)
        ]

    for rank, failure in enumerate(failures, start=1):
        ours, theirs = context.Pipe()
        process = context.Process(target=engine, args=(members(rank), failure, updates, stand_in, theirs))
        process.start()
        theirs.close()
        engines.append(Engine(process, ours))
    transports = [MappedTransport(member, stage, LIMIT, device) for stage, member in enumerate(members(0))]
    try:
        yield transports, engines
    finally:
        for transport in transports:
            transport.close()
        for each in engines:
            each.process.kill()
            each.process.join()


def in_parallel(calls: list[Any]) -> None:
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def answer(engine: Engine) -> Any:
    wait_until(engine.answers.poll, [engine.process.pid or 0], "the engine's answer")
    return engine.answers.recv()


def mapped_folders() -> list[Path]:
    return [path for path in Path("/dev/shm").glob(f"{PREFIX}{os.getpid()}-*") if path.is_dir()]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, or the GPU's code on a stand-in for the CUDA runtime."""
    if request.param == "cuda":
        cuda_stand_in.install(folder, monkeypatch)
    return torch.device(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    cuda_runtime._library.cache_clear()


def test_every_engine_receives_two_updates_of_two_stages(device: torch.device, folder: Path) -> None:
    with processes(["", ""], stages=2, updates=2, device=device) as (transports, engines):
        in_parallel([transport.connect for transport in transports])
        assert not mapped_folders(), "mapped memory has no name, which would remain if processes are killed"
        for version in (1, 2):
            pushed: dict[int, Any] = {}

            def push(transport: MappedTransport, version: int = version, into: dict[int, Any] = pushed) -> None:
                named = iter(tensors(transport.stage))
                into[transport.stage] = transport.push(named, version, ChecksumTaker(1))

            in_parallel([lambda transport=transport: push(transport) for transport in transports])
            sent = pushed[0].checksums.plain | pushed[1].checksums.plain
            assert len(sent) == 18
            assert pushed[1].bytes == sum(tensor.nbytes for _, tensor in tensors(1))
            for each in engines:
                assert answer(each) == sent
        for each in engines:
            assert answer(each) == "closed"
    assert not list(folder.iterdir()), "all memory was released"


@pytest.mark.parametrize(
    ("failure", "seen_by_others"), [("fails", "failure in process 1 of the engines"), ("dies", "")]
)
def test_an_engine_that_fails_during_an_update_stops_all(failure: str, seen_by_others: str) -> None:
    with processes([failure, ""]) as (transports, engines):
        transports[0].connect()
        with pytest.raises(
            WeightsNotSent, match=f"sending weights of version 7 failed after 728 bytes: .*{seen_by_others}"
        ):
            transports[0].push(iter(tensors(0)), 7)
        other = answer(engines[1])
        assert isinstance(other, str) and seen_by_others in other
        if failure == "fails":
            assert answer(engines[0]) == "the tensor does not fit"


def test_an_engine_that_dies_is_noticed_by_processes_not_next_to_it() -> None:
    """In a ring of five processes, none waits for the timeout."""
    with processes(["", "", "dies", ""]) as (transports, engines):
        transports[0].connect()
        with pytest.raises(WeightsNotSent, match="sending weights of version 7 failed after 728 bytes"):
            transports[0].push(iter(tensors(0)), 7)
        for each in engines[:2] + engines[3:]:
            assert isinstance(answer(each), str)


def test_a_sender_that_fails_is_noticed() -> None:
    with processes([""]) as (transports, engines):
        transports[0].connect()

        def broken() -> Iterator[tuple[str, torch.Tensor]]:
            yield from tensors(0)[:4]
            raise OSError("the actor failed")

        with pytest.raises(OSError, match="the actor failed"):
            transports[0].push(broken(), 7)
        transports[0].close()
        assert isinstance(answer(engines[0]), str)


def test_an_engine_that_cannot_map_the_memory_is_noticed() -> None:
    with processes(["no room", ""]) as (transports, engines):
        with pytest.raises(WeightsNotSent, match="failure in process 1 of the engines"):
            transports[0].connect()
        assert answer(engines[0]) == "no room to map it"
        assert "failure in process 1 of the engines" in answer(engines[1])
    assert not mapped_folders()


def test_errors_of_cuda_are_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="this torch is not built for CUDA"):
        cuda_runtime.malloc(1)
    cuda_stand_in.install(folder, monkeypatch)
    with pytest.raises(RuntimeError, match=r"cudaMalloc: error of the stand-in \(2\)"):
        cuda_runtime.malloc(cuda_stand_in.MOST + 1)
    with pytest.raises(RuntimeError, match=r"cudaIpcOpenMemHandle: .* \(400\)"):
        cuda_runtime.ipc_open(bytes(range(64)))
    owned = device_memory.allocate(8, torch.device("cuda"))
    owned.close()
    owned.close()
    assert not list(folder.iterdir())


def test_an_engine_that_does_not_join_is_noticed() -> None:
    with processes([], seconds=1.0) as (transports, _):
        transports[0].member = GroupMember("mapped", LOOPBACK, open_port(LOOPBACK), "gloo", 2, 0, 1.0, "cuda_ipc")
        with pytest.raises(WeightsNotSent, match="not all engines joined"):
            transports[0].connect()


def test_a_sender_without_memory_fails_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.weight_sync.mapped.allocate", no_room)
    with processes([""]) as (transports, engines):
        with pytest.raises(WeightsNotSent, match="no room"):
            transports[0].connect()
        assert isinstance(answer(engines[0]), str), "the engine does not wait for the timeout"
