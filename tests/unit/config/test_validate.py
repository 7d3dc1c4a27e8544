"""Inputs are checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.config import check_inputs
from megatron_rl.errors import UserError

SHAPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "vocab_size": 95,
}


@pytest.fixture
def inputs(load) -> Path:
    """Writes all files that the minimal configuration names into the working directory."""
    Path("train.jsonl").write_text("{}")
    model = Path("model")
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    (model / "tokenizer.json").touch()
    (model / "model.safetensors").touch()
    return model


def problems(config, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_inputs(config, **options)
    return str(caught.value).splitlines()


def test_complete_inputs_pass(load, inputs):
    check_inputs(load())


def test_missing_files_are_all_named(load, inputs):
    Path("train.jsonl").unlink()
    found = problems(
        load(
            "evaluation.suites.s=absent.parquet",
            "warm_start={batch_size: 1, phases: [{data: w.parquet, steps: 1, lr: 1}]}",
            "resume=absent",
        )
    )
    assert [line.split(":")[0] for line in found] == [
        "data.train",
        "evaluation.suites.s",
        "warm_start.phases.0.data",
        "resume",
    ]
    assert all("no such" in line and str(Path.cwd()) in line for line in found)


def test_an_unknown_file_extension_is_refused(load, inputs):
    Path("train.csv").touch()
    assert problems(load("data.train=train.csv")) == [
        "data.train: train.csv has the extension '.csv'; expected .jsonl or .parquet"
    ]


@pytest.mark.parametrize(
    ("file", "words"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_an_incomplete_model_folder_is_refused(load, inputs, file, words):
    (inputs / file).unlink()
    (line,) = problems(load())
    assert line.startswith("model.path: ")
    assert words in line


def test_a_missing_model_folder_and_a_broken_config_are_refused(load, inputs):
    assert "no such folder: elsewhere" in problems(load("model.path=elsewhere"))[0]
    (inputs / "config.json").write_text("{")
    assert "not valid JSON" in problems(load())[0]


def test_a_dry_run_needs_no_weights(load, inputs):
    (inputs / "model.safetensors").unlink()
    check_inputs(load(), weights=False)


def test_files_that_prepare_will_write_are_not_required(load):
    config = load(
        "prepare={task: countdown, folder: task}",
        "model.path=task/model",
        "data.train=./task/train.jsonl",
        "evaluation.suites.own=own.jsonl",
    )
    assert [line.split(":")[0] for line in problems(config, prepared=False)] == ["evaluation.suites.own"]
    assert len(problems(config)) == 3
