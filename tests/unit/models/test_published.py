"""The sizes of published models, against the published numbers of parameters and the config.json that tests use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.published import PUBLISHED, known_config
from megatron_rl.plan.parameters import model_parameters

FIXTURES = Path(__file__).parents[2] / "fixtures/models"

PARAMETERS = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
}
"""As the Hub shows them for the safetensors of each model."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    assert model_parameters(Architecture.from_hf(PUBLISHED[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["Qwen3-14B-Base", "Qwen2.5-32B"])
def test_the_config_is_that_of_the_model(name: str) -> None:
    own = json.loads((FIXTURES / name / "config.json").read_text())
    assert Architecture.from_hf(known_config(Path("models", name))) == Architecture.from_hf(own)


def test_a_folder_counts_more_than_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-14B"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mine"}')
    assert known_config(folder) == {"model_type": "mine"}


@pytest.mark.parametrize("model", ["Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base@abc", "/models/Qwen2.5-7B-Instruct"])
def test_ids_and_paths_of_published_models_are_known(model: str) -> None:
    assert known_config(Path(model))["num_hidden_layers"] in (36, 28)


def test_any_other_model_is_an_error() -> None:
    with pytest.raises(UserError, match=r"models/mine is no folder here.*Qwen3-0\.6B"):
        known_config(Path("models/mine"))
