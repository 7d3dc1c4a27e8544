from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_rl.checkpoint.shards import GrowingShard, ShardTensors, write_shard
from megatron_rl.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8)


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    shapes = draw(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 5), max_size=3), max_size=4))
    return {name: torch.randint(0, 100, shape).to(dtype) for name, shape in shapes.items() if name != "__metadata__"}


@given(tensors=named_tensors())
def test_safetensors_itself_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    entry = write_shard(path, "weights", tensors)
    assert (entry.kind, entry.tensors) == ("weights", tuple(tensors))
    assert entry.bytes == path.stat().st_size
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())


@given(tensors=named_tensors())
def test_a_growing_file_is_the_same_in_the_end(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    file = GrowingShard(path)
    for name, tensor in tensors.items():
        file.add(name, tensor.clone())
        assert not path.exists()
    file.close()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())
    assert file.size == sum(tensor.nbytes for tensor in tensors.values())
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_growing_file_says_when_it_has_no_room_for_names(tmp_path: Path) -> None:
    file = GrowingShard(tmp_path / "x.safetensors")
    for i in range(2):
        file.add("x" * 600_000 + str(i), torch.ones(1))
    with pytest.raises(ValueError, match="2 tensors are too many for one file"):
        file.close()
    assert not file.path.exists()


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "slice": torch.arange(9.0)[2:5]}
    write_shard(tmp_path / "x.safetensors", "weights", tensors)
    assert all(torch.equal(read, tensors[name]) for name, read in load_file(tmp_path / "x.safetensors").items())


def test_tensors_of_a_kind_are_found_in_all_its_files(tmp_path: Path) -> None:
    written = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.ones(1)}
    files = {
        "1.safetensors": write_shard(tmp_path / "1.safetensors", "weights", {"a": written["a"]}),
        "2.safetensors": write_shard(tmp_path / "2.safetensors", "weights", {"b": written["b"], "c": written["c"]}),
        "3.safetensors": write_shard(tmp_path / "3.safetensors", "exp_avg", {"a": torch.full((2,), 7.0)}),
    }
    weights = ShardTensors(tmp_path, files, "weights")
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {n: t.tolist() for n, t in written.items()}
    assert not ShardTensors(tmp_path, files, "lagged")


@pytest.mark.parametrize("damage", ["short", "gone", "other"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "1.safetensors"
    files = {path.name: write_shard(path, "weights", {"a": torch.ones(2)})}
    if damage == "short":
        path.write_bytes(path.read_bytes()[:20])
    elif damage == "gone":
        path.unlink()
    else:
        write_shard(path, "weights", {"b": torch.ones(2)})
    with pytest.raises(UserError, match=rf"{path} is damaged .*resume=PATH"):
        ShardTensors(tmp_path, files, "weights")["a"]
