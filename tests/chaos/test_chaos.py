"""A run meets a fixed choice of faults, and ends as the undisturbed run. `make chaos` draws many more at random."""

from __future__ import annotations

import random
import signal

import pytest

from tests.chaos import files
from tests.chaos.episode import Episode
from tests.chaos.faults import second_run, signalled
from tests.chaos.load import slopes
from tests.chaos.world import World
from tests.tiers import slow

pytestmark = [pytest.mark.e2e, slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("chaos"))


def test_a_disturbed_run_ends_like_the_undisturbed_one(world: World) -> None:
    """One start of the run loses a rank of its actor and an engine, and is disturbed by a second run."""
    script = (
        ("second run", second_run),
        ("SIGKILL", signalled(signal.SIGKILL, ("actor",))),
        ("SIGKILL", signalled(signal.SIGKILL, ("engine",))),
    )
    met = Episode(world, seed=0, number=1, most=len(script), script=script).play()
    assert [one.target for one in met] == ["refused", "actor", "engine"]
    assert {one.verdict for one in met} == {"equal"} and met[1].effect == "opened again by itself", met


def test_slopes_tell_what_grows_from_what_varies() -> None:
    rng = random.Random(1)
    samples = [
        {"step": step, "grows": 0.5 * step + rng.random(), "varies": rng.random()} for step in range(0, 8000, 10)
    ]
    found = slopes(samples)
    assert abs(found["grows"]["slope"] - 500) <= found["grows"]["±"] < 0.1
    assert abs(found["varies"]["slope"]) <= found["varies"]["±"] < 0.1
    assert slopes(samples[:40]) == {}, "too few"


def test_damaged_files_are_noticed(world: World) -> None:
    met = files.play(world, seed=0, number=2, most=60)
    assert len(met) > 50 and {one.verdict for one in met} == {"equal"}, met
