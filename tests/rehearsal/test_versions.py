"""Names, marks and a step of the actor under every pair of versions of Transformer Engine and megatron-core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families import FAMILIES as SUPPORTED_FAMILIES
from megatron_rl.models.hf_format import read_config
from tests.rehearsal.cases import BASE, CPU_WITH_ENGINE, FAMILIES, LOCAL, SMOKE, TP_SP, family_config
from tests.rehearsal.harness import Models, Outcome, assert_alike, pair_name, references, run_cases, steps_of
from tests.rehearsal.versions import MEGATRONS, NEWEST, PAIRS, Pair
from tests.tiers import chosen

pytestmark = pytest.mark.rehearsal

SPLIT_DIMENSION = {"replicated": None, "row": 1, "vocab": 0, "qkv": 0, "gate_up": 0}
"""How a tensor is built -> the dimension in which tensor-parallel ranks split it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, models: Models) -> dict[str, Outcome]:
    return references(tmp_path_factory.mktemp("reference"), models, {"qwen3", "experts"}, NEWEST[1])


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Returns name -> folder with the configuration."""
    folder = tmp_path_factory.mktemp("families")
    for number, name in enumerate(FAMILIES):
        (folder / str(number)).mkdir()
        (folder / str(number) / "config.json").write_text(json.dumps(family_config(name)))
    return {name: str(folder / str(number)) for number, name in enumerate(FAMILIES)}


@pytest.fixture(scope="module")
def rehearsed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Models, families: dict[str, str]
) -> dict[Pair, dict[str, Outcome]]:
    """Returns what the cases of each pair found: "names", and the steps of SMOKE."""
    settings = {name: family[2] for name, family in FAMILIES.items()}
    cases = {"names": {"work": "names", "models": families, "actor": BASE | TP_SP, "settings": settings}}
    cases |= {name: steps_of(case, models, count=1) for name, case in SMOKE.items()}
    folder = tmp_path_factory.mktemp("pairs")
    return {pair: run_cases(folder / "-".join(pair), *pair, cases) for pair in PAIRS if pair in chosen(request, "pair")}


def test_no_family_is_left_out(families: dict[str, str]) -> None:
    rehearsed = {Architecture.from_hf(read_config(Path(folder))).family for folder in families.values()}
    assert rehearsed == set(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_every_parameter_is_in_the_weight_map_and_marked(rehearsed: dict[Pair, dict[str, Outcome]], pair: Pair) -> None:
    """Without the right mark, the gradient norm counts a shard too seldom, or a replica too often."""
    found: dict[str, list[dict[str, Any]]] = rehearsed[pair]["names"].result()
    assert list(found) == list(FAMILIES)
    for family, parameters in found.items():
        wrong = [problem for parameter in parameters for problem in _wrong(parameter)]
        assert not wrong, f"{family}: {wrong}"


def _wrong(parameter: dict[str, Any]) -> list[str]:
    """Returns what is wrong with the description of a parameter at TP 2 with sequence parallelism."""
    name = parameter["name"]
    if "error" in parameter:
        return [f"{name}: {parameter['error']}"]
    dimension = SPLIT_DIMENSION[parameter["kind"]]
    wrong = []
    if parameter["split"] != dimension:
        wrong.append(f"{name} is marked as split in dimension {parameter['split']}, not {dimension}")
    if parameter["sequence"] != (dimension is None):
        wrong.append(f"{name} is {'' if parameter['sequence'] else 'not '}marked as seeing a part of the sequence")
    if parameter["expert"] and ".experts." not in name:
        wrong.append(f"{name} is marked as an expert's")
    return wrong


@pytest.mark.parametrize("case", SMOKE)
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_a_step_equals_that_of_the_local_layers(
    rehearsed: dict[Pair, dict[str, Outcome]], reference: dict[str, Outcome], pair: Pair, case: str
) -> None:
    assert_alike(rehearsed[pair][case], reference[SMOKE[case].model], first_only=True)


@pytest.mark.parametrize("megatron", MEGATRONS)
def test_cuda_without_transformer_engine_takes_the_same_steps(
    tmp_path: Path, models: Models, reference: dict[str, Outcome], megatron: str
) -> None:
    cases = {name: steps_of(case, models, dtype="float32") for name, case in LOCAL.items()}
    for name, outcome in run_cases(tmp_path / "cases", None, megatron, cases).items():
        assert "local layers" in outcome.result()["description"]
        assert_alike(outcome, reference[LOCAL[name].model])


def test_a_cpu_where_transformer_engine_is_installed_uses_local_layers(
    tmp_path: Path, models: Models, reference: dict[str, Outcome]
) -> None:
    cases = {name: steps_of(case, models, device="cpu", dtype="float32") for name, case in CPU_WITH_ENGINE.items()}
    for name, outcome in run_cases(tmp_path / "cases", *NEWEST, cases, plain=True).items():
        assert_alike(outcome, reference[CPU_WITH_ENGINE[name].model])
