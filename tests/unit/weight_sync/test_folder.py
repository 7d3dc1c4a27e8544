"""The weights that an engine reads from a folder are those that were written."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.weight_sync.checksums import ChecksumTaker, WeightsDamaged, compare
from megatron_rl.weight_sync.digest import digest
from megatron_rl.weight_sync.folder import FolderTransport
from megatron_rl.weight_sync.transport import FolderUpdate, Pushed

SMALL = 256
"""Bytes of a bucket, fewer than all tensors take together."""


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Values with signs, subnormals and infinities, a transposed view, and a scalar."""
    torch.manual_seed(0)
    values = torch.randn(64) * torch.logspace(-40, 38, 64)
    values[:3] = torch.tensor([float("inf"), -0.0, float("-inf")])
    return {
        "w.a.weight": values.to(dtype),
        "w.b.weight": torch.randn(3, 5).to(dtype).T,
        "w.c.weight": torch.tensor(2.5, dtype=dtype),
    }


def push(folder: Path, stage: int = 0, *, version: int = 1, dtype: torch.dtype = torch.float32) -> Pushed:
    transport = FolderTransport(folder / "made-on-connect", stage, SMALL)
    transport.connect()
    named = ((f"{stage}.{name}", tensor) for name, tensor in tensors(dtype).items())
    return transport.push(named, version, ChecksumTaker(1))


def update(*stages: Pushed) -> FolderUpdate:
    return FolderUpdate(1, tuple(part for stage in stages for part in stage.parts))


def held(stages: FolderUpdate) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in stages.tensors()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pushed_weights_arrive_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    pushed = push(tmp_path, dtype=dtype)
    arrived, sent = dict(update(pushed).tensors()), tensors(dtype)
    assert set(arrived) == {f"0.{name}" for name in sent}
    for name, tensor in sent.items():
        other = arrived[f"0.{name}"]
        assert (other.dtype, other.shape) == (dtype, tensor.shape)
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(other.view(integers), tensor.contiguous().view(integers))
    assert pushed.bytes == sum(t.nbytes for t in sent.values())
    assert pushed.checksums and compare(pushed.checksums.plain, held(update(pushed)), 1) == len(sent)


def test_no_file_holds_more_than_a_bucket(tmp_path: Path) -> None:
    pushed = push(tmp_path)
    assert len(pushed.parts) == 2
    assert {path.name for path in pushed.parts} == {f"stage-00-bucket-00{i}.safetensors" for i in range(2)}


def test_dtypes_do_not_share_a_file(tmp_path: Path) -> None:
    """Wider values after an odd number of narrow ones would be misaligned for mapping."""
    sent = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.bfloat16)}
    pushed = FolderTransport(tmp_path, 0, SMALL).push(sent.items(), 1)
    arrived = dict(update(pushed).tensors())
    assert len(pushed.parts) == 3
    assert {name: (t.dtype, t.tolist()) for name, t in arrived.items()} == {
        name: (t.dtype, t.tolist()) for name, t in sent.items()
    }


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    pushed = push(tmp_path)
    assert pushed.checksums
    path = pushed.parts[0]
    content = path.read_bytes()
    for back in range(1, 200, 37):
        damaged = bytearray(content)
        damaged[-back] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(WeightsDamaged, match=r"weights of version 1 arrived damaged: 1 of 3 .* first is 0\."):
            compare(pushed.checksums.plain, held(update(pushed)), 1)


def test_the_files_of_all_stages_form_one_update(tmp_path: Path) -> None:
    stages = [push(tmp_path, stage) for stage in range(3)]
    names = [name for name, _ in update(*stages).tensors()]
    assert sorted(names) == sorted(f"{stage}.{name}" for stage in range(3) for name in tensors(torch.float32))


def test_a_new_version_replaces_the_previous_one(tmp_path: Path) -> None:
    transport = FolderTransport(tmp_path, 0, SMALL)
    for version in (1, 2):
        pushed = transport.push([("w", torch.full((2,), float(version)))], version)
    assert [path.name for path in tmp_path.iterdir()] == ["stage-00-bucket-000.safetensors"]
    assert dict(update(pushed).tensors())["w"].tolist() == [2.0, 2.0]
    assert pushed.checksums is None


def test_a_tensor_read_before_a_push_keeps_its_values(tmp_path: Path) -> None:
    """The file is replaced, not overwritten, as an engine may still have the old one mapped."""
    transport = FolderTransport(tmp_path, 0, SMALL)
    (_, mapped), *_ = update(transport.push([("w", torch.ones(1000))], 1)).tensors()
    transport.push([("w", torch.zeros(1000))], 2)
    assert mapped.eq(1).all()


def test_a_folder_that_cannot_take_the_weights_is_named(tmp_path: Path) -> None:
    """A limit of the size of files stands in for a file system that is full."""
    (soft, hard), handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*/made-on-connect: File too large. Free some space"):
            push(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
