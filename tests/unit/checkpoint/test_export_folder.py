from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.checkpoint.export import export_hf, largest_logit_difference
from megatron_rl.models.hf_format import INDEX, SINGLE, open_weights
from megatron_rl.models.hf_shards import HfShard, write_hf_shards
from tests.hf_models import hf_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Folder of another model, with a file that is neither configuration nor weights."""
    hf_model(seed=0).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> list[HfShard]:
    """Write the tensors as `count` pipeline stages do."""
    items = list(tensors.items())
    return [shard for i in range(count) for shard in write_hf_shards(folder, items[i::count], part=i)]


def rows() -> SequenceBatch:
    return SequenceBatch.of([[1, 2, 3, 4, 5], [6, 7, 8]], [2, 1])


def logits(of: PreTrainedModel) -> np.ndarray:
    """[T, V], one sampled token at a time."""
    parts = []
    with torch.inference_mode():
        for row, start in zip(rows().sequences, (2, 1), strict=True):
            parts += [of(torch.tensor(row[None, :end])).logits[0, -1].numpy() for end in range(start, len(row))]
    return np.stack(parts)


@pytest.mark.parametrize("stages", [1, 3])
def test_an_export_loads_as_the_same_model(tmp_path: Path, source: Path, stages: int) -> None:
    trained = hf_model(seed=1)
    tensors = trained.state_dict()
    export_hf(tmp_path / "hf", source, lambda folder: write_shards(folder, tensors, stages))
    weights = open_weights(tmp_path / "hf")
    assert set(weights) == set(tensors)
    assert all(torch.equal(weights[name], tensors[name]) for name in tensors)
    assert (tmp_path / "hf" / INDEX).exists() == (stages > 1)
    if stages > 1:
        total = json.loads((tmp_path / "hf" / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(t.nbytes for t in tensors.values())
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    assert largest_logit_difference(tmp_path / "hf", rows(), logits(trained), "float32") < 1e-5


def test_another_model_or_a_nan_is_noticed(tmp_path: Path, source: Path) -> None:
    trained = hf_model(seed=1)
    export_hf(tmp_path / "hf", source, lambda folder: write_shards(folder, hf_model(seed=2).state_dict(), 1))
    assert largest_logit_difference(tmp_path / "hf", rows(), logits(trained), "float32") > 1e-2
    spoilt = logits(trained)
    spoilt[0, 0] = np.nan
    assert np.isnan(largest_logit_difference(tmp_path / "hf", rows(), spoilt, "float32"))


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, source: Path) -> None:
    tensors = hf_model(seed=1).state_dict()
    export_hf(tmp_path / "hf", source, lambda folder: write_shards(folder, tensors, 3))

    def fail(folder: Path) -> list[HfShard]:
        save_file({"w": torch.zeros(1)}, folder / SINGLE)
        raise RuntimeError("a rank died")

    for name in ("hf", "other"):
        with pytest.raises(RuntimeError, match="a rank died"):
            export_hf(tmp_path / name, source, fail)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "hf"}
    assert set(open_weights(tmp_path / "hf")) == set(tensors)


def test_a_new_export_replaces_all_of_the_old_one(tmp_path: Path, source: Path) -> None:
    for stages in (3, 1):
        tensors = hf_model(seed=stages).state_dict()
        export_hf(tmp_path / "hf", source, partial(write_shards, tensors=tensors, count=stages))
    assert {path.name for path in (tmp_path / "hf").glob("*.safetensors*")} == {SINGLE}
    assert torch.equal(load_file(tmp_path / "hf" / SINGLE)["lm_head.weight"], tensors["lm_head.weight"])
