from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import INDEX, SINGLE, copy_all_but_weights, open_weights, read_config


def test_read_config_returns_the_content_of_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert read_config(tmp_path) == {"vocab_size": 7}


def test_a_missing_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist.*model\.path"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no config.json"),
        ("{", "not valid JSON"),
        ("[1]", "a JSON object is expected"),
        ("\xff", "not UTF-8"),
    ],
)
def test_a_missing_or_invalid_config_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


def test_weights_are_read_from_one_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(tensors, tmp_path / SINGLE)
    weights = open_weights(tmp_path)
    assert set(weights) == {"a", "b"}
    assert torch.equal(weights["a"], tensors["a"])


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    save_file({"a": torch.arange(3.0)}, folder / "first.safetensors")
    save_file({"b": torch.ones(2)}, folder / "second.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_weights_are_read_from_several_files(tmp_path: Path) -> None:
    shard(tmp_path, {"a": "first.safetensors", "b": "second.safetensors"})
    weights = open_weights(tmp_path)
    assert len(weights) == 2
    assert torch.equal(weights["b"], torch.ones(2))
    with pytest.raises(KeyError):
        weights["c"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model folder without weights"):
        open_weights(tmp_path)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, {"a": "first.safetensors", "b": "third.safetensors"})
    with pytest.raises(UserError, match=r"files that are not there: third\.safetensors"):
        open_weights(tmp_path)


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, {"c": "first.safetensors"})
    with pytest.raises(UserError, match=r"first\.safetensors does not hold c"):
        open_weights(tmp_path)["c"]


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        open_weights(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:50])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_weights(tmp_path)


def test_all_files_except_the_weights_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt", SINGLE, INDEX, "pytorch_model.bin"):
        (source / name).write_text(name)
    copy_all_but_weights(source, target)
    assert {path.name for path in target.iterdir()} == {"config.json", "tokenizer.json", "vocab.txt"}
