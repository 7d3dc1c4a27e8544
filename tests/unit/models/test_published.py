"""The sizes of published models, against the published numbers of parameters and the config.json that tests use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layout_check import check_layout
from megatron_rl.models.published import known_config, published_models
from megatron_rl.plan.parameters import model_parameters

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests/fixtures/models"

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


@pytest.mark.parametrize("name", published_models())
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    size = name.removesuffix("-Base").removesuffix("-Instruct")
    assert model_parameters(Architecture.from_hf(known_config(Path(name)))) == PARAMETERS[size]


def test_every_published_size_has_a_config() -> None:
    assert set(PARAMETERS) <= set(published_models())


def test_models_of_one_size_differ_in_positions() -> None:
    names = ("Qwen3-14B", "Qwen3-14B-Base", "Qwen2.5-7B", "Qwen2.5-7B-Instruct")
    positions = [Architecture.from_hf(known_config(Path("Qwen", name))).max_positions for name in names]
    assert positions == [40_960, 32_768, 131_072, 32_768]


def test_the_layout_of_a_published_model_is_checked_before_the_model_is_here() -> None:
    config = load_config(ROOT / "examples/recipes/qwen3-14b/dppo_with_lp_reg_off.yaml", ["actor.tensor_parallel=3"])
    with pytest.raises(UserError, match=r"tensor_parallel is 3.*attention heads \(40\)"):
        check_layout(config)


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
