"""The actor's GPU path on a CPU, with the newest versions. docs/rehearsal.md says what it proves and what not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lpreg.losses.registry import METHODS
from tests.rehearsal.cases import BASE, METHOD_LAYOUTS, ROWS, STATES, STEPS, WAITS
from tests.rehearsal.harness import Models, Outcome, assert_alike, references, run_cases, steps_of
from tests.rehearsal.versions import NEWEST
from tests.tiers import chosen

pytestmark = pytest.mark.rehearsal

CEILINGS = Path(__file__).with_name("ceilings.json")
"""Layout -> "phase: kind, owner" -> waits for the GPU and blocking copies to it, as `totals` counts them."""


STORED = {"kl_estimator": "full"}
"""Settings of Lp-Reg with which a stored proxy distribution takes part in the loss."""


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


@pytest.fixture(scope="module")
def states(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Models
) -> dict[str, Outcome]:
    names = [name for name in STATES if name in chosen(request, "layout")]
    cases = {name: steps_of(STATES[name], models) | {"work": "state"} for name in names}
    return run_cases(tmp_path_factory.mktemp("states") / "cuda", *NEWEST, cases)


@pytest.mark.parametrize("layout", STATES)
def test_weights_snapshots_and_checkpoints_come_back_unchanged(states: dict[str, Outcome], layout: str) -> None:
    found = states[layout].result()
    assert found["exported"] and not found["different"]
    assert found["published"] == found["written"] == len(found["exported"])
    assert found["lagged"] == found["scores"], "the snapshot gives the scores of the weights that it copied"
    assert len(set(found["trained"])) == 2 and found["after"][0] not in found["trained"], "steps change the weights"
    assert found["resumed"] == found["after"], "a step after resuming is the step that followed the checkpoint"


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, models: Models) -> dict[str, Outcome]:
    """Returns what every method computes: on CUDA under each layout, and "reference" on the CPU as what it is."""
    policies = {name: models("qwen3", seed) for seed, name in enumerate(("model", "new", "lagged", "reference"))}
    shape = ROWS | {"count": 18, "response": 20}
    cases = {
        name: {"work": "methods", "actor": BASE | case.actor, "rows": shape} | policies
        for name, case in METHOD_LAYOUTS.items()
    }
    plain = {"reference": cases["one rank"] | {"actor": BASE | {"device": "cpu", "dtype": "float32"}}}
    folder = tmp_path_factory.mktemp("methods")
    return run_cases(folder / "cuda", *NEWEST, cases) | run_cases(folder / "cpu", None, NEWEST[1], plain, plain=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", METHOD_LAYOUTS)
def test_every_method_computes_what_it_does_on_local_layers(
    computed: dict[str, Outcome], layout: str, method: str
) -> None:
    found, expected = computed[layout].result()[method], computed["reference"].result()[method]
    assert found.keys() == expected.keys()
    assert found["train/loss"] == pytest.approx(expected["train/loss"], rel=METHOD, abs=METHOD)
    assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=METHOD)


METHOD = 3e-2
"""Largest difference between bf16 and fp32 of losses and norms. A few tokens near a clipping bound fall on its other
side."""


@pytest.fixture(scope="module")
def counted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: Models
) -> dict[str, Outcome]:
    """Few tokens: lpreg's kernels, which run on GPUs only, run in Triton's interpreter."""
    shape = {"rows": ROWS | {"prompt": 20, "response": 10}, "counts": [4, 8], "lp_reg": STORED}
    cases = {
        name: steps_of(case, models, micro_batch_tokens=64) | shape | {"work": "waits"}
        for name, case in WAITS.items()
        if name in chosen(request, "counts")
    }
    return run_cases(tmp_path_factory.mktemp("waits") / "cuda", *NEWEST, cases, TRITON_INTERPRET="1")


@pytest.mark.parametrize("counts", WAITS)
def test_waits_for_the_gpu_are_those_of_the_ceilings(counted: dict[str, Outcome], counts: str) -> None:
    """A ceiling only falls: see `ceilings.json`."""
    places: dict[str, dict[str, float]] = counted[counts].result()
    ceilings = json.loads(CEILINGS.read_text())[counts]
    found = totals(places)
    above = {key: (found[key], ceilings.get(key, 0)) for key in found if found[key] > ceilings.get(key, 0)}
    assert not above, f"more than the ceilings: {above}\n{listed(places)}"
    below = {key: (found.get(key, 0), ceiling) for key, ceiling in ceilings.items() if found.get(key, 0) < ceiling}
    assert not below, f"fewer than the ceilings: lower them in {CEILINGS.name} to {found}: {below}"


def totals(places: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns "phase: kind, owner" -> number."""
    sums: Counter[str] = Counter()
    for phase, numbers in places.items():
        for place, number in numbers.items():
            kind, owner, _ = place.split(" | ")
            sums[f"{phase}: {kind}, {owner}"] += number
    return {key: round(number, 3) for key, number in sorted(sums.items()) if number}


def listed(places: dict[str, dict[str, float]]) -> str:
    lines = [f"{number:8.2f}  {phase}  {place}" for phase, found in places.items() for place, number in found.items()]
    return "\n".join(sorted(lines, key=lambda line: -float(line.split()[0])))
