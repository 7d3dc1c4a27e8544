"""The weights of a model folder are checked before anything loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import DEFAULTS, SUPPORTED, Architecture
from megatron_rl.models.hf_format import INDEX, SINGLE
from megatron_rl.models.weights_check import check_weights
from tests.hf_models import config_json, write_hf_model


def rewrite(folder: Path, change: Any) -> None:
    """Writes the folder's tensors again after `change` of the dict."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_weights(folder)
    return str(caught.value)


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("tied", [False, True])
def test_models_as_transformers_writes_them_pass(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = write_hf_model(tmp_path, model_type, tie_word_embeddings=tied)
    check_weights(folder)


@pytest.mark.parametrize("buffer", ["inv_freq", "cos_cached", "sin_cached"])
def test_stored_buffers_of_the_rotary_embedding_are_no_weights(tmp_path: Path, buffer: str) -> None:
    folder = write_hf_model(tmp_path, "llama")
    names = [f"model.layers.{layer}.self_attn.rotary_emb.{buffer}" for layer in range(2)]
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(4) for name in names}))
    check_weights(folder)


def test_a_stored_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_weights(folder)


@pytest.mark.parametrize("place", [(0, 0), (49, 31)])
def test_a_stored_head_that_differs_from_a_tied_embedding_is_refused(tmp_path: Path, place: tuple[int, int]) -> None:
    folder = write_hf_model(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        head[place] += 1
        tensors["lm_head.weight"] = head

    rewrite(folder, change)
    message = refused(folder)
    assert "tie_word_embeddings: true" in message and "lm_head.weight" in message and str(folder) in message


def test_a_missing_head_names_the_key_that_may_be_wrong(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path, tie_word_embeddings=True)
    set_config(folder, tie_word_embeddings=False)
    message = refused(folder)
    assert "missing: lm_head.weight" in message and "tie_word_embeddings: true" in message


@pytest.mark.parametrize("cut", [1, 1000, -3])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, cut: int, sharded: bool) -> None:
    """-3: the file ends within its header."""
    folder = write_hf_model(tmp_path)
    name = shard(folder)[-1] if sharded else SINGLE
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-cut] if cut > 0 else content[:20])
    assert name in (message := refused(folder)) and "Copy the model again" in message


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path)
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(folder)


def shard(folder: Path) -> list[str]:
    """Splits the folder's one file into two with an index. Returns their names."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name, place in weight_map.items() if place == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_a_folder_in_several_files_passes_and_needs_its_index(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path)
    files = shard(folder)
    check_weights(folder)
    (folder / INDEX).unlink()
    message = refused(folder)
    assert files[0] in message and INDEX in message


def test_an_index_that_lists_too_little_is_refused(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path)
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "missing: model.norm.weight" in refused(folder)


@pytest.mark.parametrize("weight_map", [[], {}, {"model.norm.weight": 3}, "x"])
def test_an_index_of_another_form_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = write_hf_model(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refused(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "save_pretrained"),
        ("consolidated.00.pth", "save_pretrained"),
        ("model-q4.gguf", "save_pretrained"),
        ("adapter_model.safetensors", "Merge it into its base model"),
        ("weights.safetensors", "Rename"),
    ],
)
def test_weights_in_another_file_are_named_with_a_remedy(tmp_path: Path, name: str, words: str) -> None:
    folder = write_hf_model(tmp_path)
    (folder / SINGLE).rename(folder / name)
    message = refused(folder)
    assert name in message and words in message


@pytest.mark.parametrize(
    "quant", [{"quant_method": "fp8"}, {"quant_method": "gptq", "bits": 4}, {"load_in_8bit": True}]
)
def test_quantised_weights_are_refused_by_the_configuration(tmp_path: Path, quant: dict[str, Any]) -> None:
    folder = write_hf_model(tmp_path)
    set_config(folder, quantization_config=quant)
    assert "quantised weights" in (message := refused(folder)) and quant.get("quant_method", "unnamed") in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_weights_are_refused_by_their_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_hf_model(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert name in (message := refused(folder)) and "quantised" in message


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv"])
def test_quantised_weights_are_refused_by_their_names(tmp_path: Path, suffix: str) -> None:
    folder = write_hf_model(tmp_path)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert name in (message := refused(folder)) and "quantised" in message


def test_wrong_shapes_and_layers_are_listed(tmp_path: Path) -> None:
    folder = write_hf_model(tmp_path)
    set_config(folder, vocab_size=51)
    assert "model.embed_tokens.weight: shape (50, 32), expected (51, 32)" in refused(folder)
    set_config(folder, vocab_size=50, num_hidden_layers=30)
    message = refused(folder)
    assert "missing: model.layers.10." in message and "... and" in message and message.count("\n") == 11


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_key_that_is_left_out_has_the_value_of_transformers(model_type: str) -> None:
    family = SUPPORTED[model_type]
    full = AutoConfig.for_model(model_type).to_dict() | {"architectures": [family]}
    left_out = {*DEFAULTS[family], "rms_norm_eps", "head_dim", "rope_theta", "rope_parameters"}  # as in that of Llama 2
    found = Architecture.from_hf({key: value for key, value in full.items() if key not in left_out})
    assert found == Architecture.from_hf(full)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 4096),
    ],
)
def test_positions_include_rope_scaling(rope: dict[str, Any], positions: int) -> None:
    config = config_json(max_position_embeddings=4096) | {"rope_parameters": None, "rope_theta": 1e6}
    assert Architecture.from_hf(config | {"rope_scaling": rope}).max_positions == positions


def test_the_check_loads_no_torch(tmp_path: Path) -> None:
    """A login node may have none."""
    folder = write_hf_model(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    program = (
        "import sys; from pathlib import Path; from megatron_rl.models.weights_check import check_weights; "
        f"check_weights(Path({str(folder)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
