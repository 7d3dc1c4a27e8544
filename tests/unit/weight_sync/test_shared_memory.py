from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_rl.weight_sync.shared_memory import PREFIX, SharedMemoryTransport, shared_folder
from megatron_rl.weight_sync.transport import WeightUpdate, tensor_checksum


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Signs, subnormals and infinities among them, a transposed view, and one number."""
    torch.manual_seed(0)
    values = torch.randn(64) * torch.logspace(-40, 38, 64)
    values[:3] = torch.tensor([float("inf"), -0.0, float("-inf")])
    return {"a": values.to(dtype), "b": torch.randn(3, 5).to(dtype).T, "c": torch.tensor(2.5, dtype=dtype)}


def push(folder: Path, part: int = 0, *, version: int = 1, dtype: torch.dtype = torch.float32) -> WeightUpdate:
    transport = SharedMemoryTransport(folder / "made-on-connect", part)
    transport.connect()
    named = ((f"{part}.{name}", tensor) for name, tensor in tensors(dtype).items())
    return transport.push(named, version, checksums=True)


def received(update: WeightUpdate) -> dict[str, int]:
    return {name: update.checksum(tensor) for name, tensor in update.tensors()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_pushed_arrives_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    update = push(tmp_path, dtype=dtype)
    arrived = dict(update.tensors())
    sent = tensors(dtype)
    assert set(arrived) == {"0.a", "0.b", "0.c"}
    for name, tensor in sent.items():
        other = arrived[f"0.{name}"]
        assert (other.dtype, other.shape) == (dtype, tensor.shape)
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(other.view(integers), tensor.contiguous().view(integers))
    assert update.bytes == sum(t.nbytes for t in sent.values())
    update.verify(received(update))


def test_a_tensor_that_lies_anywhere_has_the_checksum_of_its_values() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert tensor_checksum(whole.T) == tensor_checksum(whole.T.contiguous()) != tensor_checksum(whole)
    assert tensor_checksum(torch.zeros(0)) == tensor_checksum(torch.zeros(0, 3))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    update = push(tmp_path)
    path, whole = update.parts[0], update.parts[0].read_bytes()
    for back in range(1, update.bytes + 1, 37):
        damaged = bytearray(whole)
        damaged[-back] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match=r"weights of version 1 arrived damaged: 1 of 3 .* first is 0\."):
            update.verify(received(update))


def test_a_tensor_that_did_not_arrive_is_found(tmp_path: Path) -> None:
    update = push(tmp_path)
    with pytest.raises(RuntimeError, match=r"1 of 3 tensors differ, the first is 0\.b"):
        update.verify({name: value for name, value in received(update).items() if name != "0.b"})


def test_without_checksums_none_are_taken(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(tmp_path, 0)
    update = transport.push(tensors(torch.float32).items(), 1, checksums=False)
    assert update.checksums == {}
    assert set(received(update).values()) == {0}


def test_the_parts_of_all_stages_are_one_update(tmp_path: Path) -> None:
    parts = [push(tmp_path, part, version=4) for part in range(3)]
    merged = WeightUpdate.merge(iter(parts))
    assert merged.version == 4
    assert [name for name, _ in merged.tensors()] == [f"{part}.{name}" for part in range(3) for name in "abc"]
    assert merged.bytes == sum(part.bytes for part in parts)
    merged.verify(received(merged))


def test_parts_of_different_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"different weight versions: \[1, 2\]"):
        WeightUpdate.merge([push(tmp_path, 0, version=1), push(tmp_path, 1, version=2)])


def test_a_later_version_replaces_the_earlier(tmp_path: Path) -> None:
    transport = SharedMemoryTransport(tmp_path, 0)
    for version in (1, 2):
        update = transport.push([("w", torch.full((2,), float(version)))], version, checksums=False)
    assert [path.name for path in tmp_path.iterdir()] == ["part-0.safetensors"]
    assert dict(update.tensors())["w"].tolist() == [2.0, 2.0]


def test_a_tensor_read_before_a_push_keeps_its_values(tmp_path: Path) -> None:
    """The file is replaced, not written over: an engine may still have the old one mapped."""
    transport = SharedMemoryTransport(tmp_path, 0)
    old = transport.push([("w", torch.ones(1000))], 1, checksums=False)
    (_, mapped), *_ = old.tensors()
    transport.push([("w", torch.zeros(1000))], 2, checksums=False)
    assert mapped.eq(1).all()


def test_shared_folders_are_fresh_and_go_away() -> None:
    first, second = shared_folder(), shared_folder()
    assert first != second and first.is_dir()
    for folder in (first, second):
        SharedMemoryTransport(folder, 0).close()
        assert not folder.exists()


def test_what_a_killed_run_left_is_removed_and_a_living_one_is_not_touched() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    living = shared_folder()
    stale = living.with_name(f"{PREFIX}{ended.pid}-abc")
    stale.mkdir()
    try:
        other = shared_folder()
        assert not stale.exists()
        assert living.is_dir() and other.is_dir()
    finally:
        for folder in (living, stale, other):
            shutil.rmtree(folder, ignore_errors=True)
