"""Files written by `utils/safetensors_files.py`, read by the safetensors package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_rl.utils.safetensors_files import SafetensorsWriter, write_safetensors

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8)


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    dtype = draw(st.sampled_from(DTYPES))
    shapes = draw(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 5), max_size=3), max_size=4))
    return {name: torch.randint(0, 100, shape).to(dtype) for name, shape in shapes.items() if name != "__metadata__"}


@given(tensors=named_tensors())
def test_the_safetensors_package_reads_the_file(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    size, sha256 = write_safetensors(path, tensors)
    assert size == path.stat().st_size
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())


@given(tensors=named_tensors())
def test_a_file_written_tensor_by_tensor_holds_the_same(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    file = SafetensorsWriter(path)
    for name, tensor in tensors.items():
        file.add(name, tensor.clone())
        assert not path.exists()
    file.close()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == value.dtype and torch.equal(read[name], value) for name, value in tensors.items())
    assert file.size == sum(tensor.nbytes for tensor in tensors.values())
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_names_that_exceed_the_reserved_header_are_an_error(tmp_path: Path) -> None:
    file = SafetensorsWriter(tmp_path / "x.safetensors")
    for i in range(2):
        file.add("x" * 600_000 + str(i), torch.ones(1))
    with pytest.raises(ValueError, match="2 tensors are too many for one file"):
        file.close()
    assert not file.path.exists()


def test_a_view_is_written_with_its_own_values(tmp_path: Path) -> None:
    tensors = {"transposed": torch.arange(6.0).view(2, 3).T, "slice": torch.arange(9.0)[2:5]}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert all(torch.equal(read, tensors[name]) for name, read in load_file(tmp_path / "x.safetensors").items())
