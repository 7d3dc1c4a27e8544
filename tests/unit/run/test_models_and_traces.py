"""A reference model of another architecture, and traces of another form, are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.run.models import check_reference, model_folders
from megatron_rl.run.traces import check_traces
from tests.hf_models import config_json
from tests.unit.doctor.test_doctor_command import CONFIG


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(CONFIG)


def config_of(*overrides: str) -> Config:
    return load_config(Path("mine.yaml"), list(overrides))


def write_config(name: str, **changes: Any) -> None:
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config_json("qwen3", **changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "layers 3 instead of 2"),
        ({"vocab_size": 51}, "vocabulary 51 instead of 50"),
        ({"tie_word_embeddings": True}, "tied True instead of False"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 500000.0 instead of 1000000.0"),
        ({"max_position_embeddings": 256}, None),
    ],
)
def test_a_reference_model_has_the_policys_architecture(changes: dict[str, Any], words: str | None) -> None:
    write_config("policy")
    write_config("reference", **changes)
    given = ["model.path=policy", "algorithm.reference_kl={coefficient: 0.1, model: reference}"]
    config = config_of(*given)
    assert model_folders(config) == [Path("policy"), Path("reference")]
    if words is None:
        check_reference(config)
        return
    with pytest.raises(UserError, match=words):
        check_reference(config)
    check_reference(config_of(*given, "algorithm.reference_kl.coefficient=0"))


def check_of(table: pa.Table | None) -> None:
    if table is None:
        Path("traces.parquet").write_text("prompt,response")
    else:
        pq.write_table(table, "traces.parquet")
    check_traces(config_of("warm_start={batch_size: 1, phases: [{data: traces.parquet, steps: 1, lr: 1}]}"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_traces_with_both_columns_pass(kind: pa.DataType) -> None:
    check_of(pa.table({"prompt": pa.array(["a"], kind), "response": pa.array(["b"], kind), "other": [1]}))
    check_traces(config_of())


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (None, "a parquet file with the columns prompt and response"),
        (pa.table({"prompt": ["a"]}), "the column response is missing"),
        (pa.table({"prompt": [["a"]], "response": ["b"]}), "the column prompt is list"),
        (pa.table({"prompt": ["a"], "response": [1]}), "the column response is int64"),
        (pa.table({"prompt": pa.array([], pa.string()), "response": pa.array([], pa.string())}), "contains no traces"),
    ],
)
def test_traces_of_another_form_are_refused(table: pa.Table | None, words: str) -> None:
    with pytest.raises(UserError, match=f"traces.parquet.*{words}"):
        check_of(table)
