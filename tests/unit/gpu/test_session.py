"""The GPU session keeps what it finds, keeps to its time, and needs nothing that its kit does not carry."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.gpu import session
from tests.gpu.kit import ON_THE_MACHINE, WHEELS
from tests.gpu.session import Paths
from tests.gpu.steps import STEPS, Step
from tests.tiers import slow

ROOT = Path(__file__).parents[3]
MODULES = [f"tests.gpu.{file.stem}" for file in sorted((ROOT / "tests/gpu").glob("*.py"))]
MACHINE = {"gpu": "a stand-in", "rehearsed": False, "torch": "2.11.0"}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def modules_that_the_machine_lacks() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    carried = {name_of(requirement) for requirement in (*WHEELS, *ON_THE_MACHINE)}
    lacking = {name_of(requirement) for requirement in project["dependencies"]} - carried
    provided = importlib.metadata.packages_distributions()
    return {module for module, names in provided.items() if lacking & {name_of(name) for name in names}}


@slow
def test_the_gpu_tests_import_nothing_that_the_kit_does_not_carry() -> None:
    lacking = modules_that_the_machine_lacks()
    assert {"ray", "math_verify", "pebble"} <= lacking
    script = f"""
import importlib, sys
for name in {sorted(lacking)}:
    sys.modules[name] = None
for name in {MODULES}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_gpu_test_is_part_of_a_step() -> None:
    named = {argument for step in STEPS for argument in step.tests if argument.endswith(".py")}
    assert named == {f"tests/gpu/{file.name}" for file in (ROOT / "tests/gpu").glob("test_*.py")}


def test_the_limits_of_the_steps_that_judge_values_fit_into_the_session() -> None:
    """The last steps measure speed only: they take the time that the others leave."""
    assert sum(step.seconds for step in STEPS[:7]) <= session.MINUTES * 60


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps over a file of ordinary tests."""
    file = tmp_path / "test_stand_in.py"
    file.write_text(
        "import time, pytest\n"
        "def test_good(record_property): record_property('ratio', 1.25)\n"
        "def test_good_elsewhere(): pytest.skip('needs two GPUs')\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_endless(): time.sleep(600)\n"
    )
    steps = tuple(
        Step(name, f"Is it {name}?", (str(file), "-k", name), seconds)
        for name, seconds in (("good", 1200), ("bad", 1200), ("endless", 3))
    )
    engine = Step("engine", "Does it run?", (str(file),), 60, transformer_engine=True)
    monkeypatch.setattr(session, "STEPS", (*steps, engine))
    monkeypatch.setattr(session, "describe", lambda paths, dry: MACHINE)
    return tmp_path / "out"


def run(out: Path, minutes: float = 60) -> tuple[dict[str, dict], str]:  # type: ignore[type-arg]
    out.mkdir()
    session.run(out, Paths(sys.executable, {"PYTHONPATH": ""}, None), minutes * 60, dry=False)
    found = json.loads((out / "session.json").read_text())
    assert found["machine"] == MACHINE
    return {step["name"]: step for step in found["steps"]}, (out / "session.md").read_text()


def test_each_step_leaves_its_outcome_and_what_it_measured(stand_in: Path) -> None:
    steps, page = run(stand_in)
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    assert outcomes == {"good": "passed", "bad": "failed", "endless": "ran out of time", "engine": "left out"}
    assert steps["good"]["cases"][0]["measured"] == {"ratio": "1.25"}
    assert "one is not two" in steps["bad"]["cases"][0]["message"]
    assert "| Is it good? | passed, 1 tests, 1 skipped | ratio: 1.25 |" in page
    assert "one is not two" in (stand_in / "log.txt").read_text()


def test_a_session_without_time_names_what_it_left_out(stand_in: Path) -> None:
    steps, _ = run(stand_in, minutes=0)
    assert {step["outcome"] for step in steps.values()} == {"left out"}
    assert steps["good"]["reason"] == "no time was left"
