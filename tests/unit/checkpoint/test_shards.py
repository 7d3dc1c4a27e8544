from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_rl.checkpoint.shards import ShardTensors, write_shard
from megatron_rl.errors import UserError


def test_the_entry_of_a_file_describes_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = write_shard(path, "weights", {"a": torch.ones(2), "b": torch.zeros(3)})
    assert (entry.kind, entry.tensors) == ("weights", ("a", "b"))
    assert entry.bytes == path.stat().st_size
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tensors_of_a_kind_are_found_in_all_files_of_that_kind(tmp_path: Path) -> None:
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
def test_an_unreadable_file_is_named_in_the_error(tmp_path: Path, damage: str) -> None:
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
