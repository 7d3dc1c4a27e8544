"""The actor's GPU path on a CPU, with the newest versions: docs/rehearsal.md says what this proves and what it cannot."""

from __future__ import annotations

import pytest

from tests.rehearsal.cases import STEPS
from tests.rehearsal.harness import Models, Outcome, assert_alike, references, run_cases, steps_of
from tests.rehearsal.versions import NEWEST
from tests.tiers import chosen

pytestmark = pytest.mark.rehearsal


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def stepped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Models
) -> dict[str, Outcome]:
    folder, names = tmp_path_factory.mktemp("steps"), [name for name in STEPS if name in chosen(request, "case")]
    found = run_cases(folder / "cuda", *NEWEST, {name: steps_of(STEPS[name], models) for name in names})
    expected = references(folder / "cpu", models, {STEPS[name].model for name in names}, NEWEST[1])
    return found | {f"{name}, reference": outcome for name, outcome in expected.items()}


@pytest.mark.parametrize("case", STEPS)
def test_steps_equal_those_of_the_local_layers(stepped: dict[str, Outcome], case: str) -> None:
    outcome = stepped[case]
    assert "Transformer Engine layers" in str(outcome.result()["description"])
    assert_alike(outcome, stepped[f"{STEPS[case].model}, reference"])
