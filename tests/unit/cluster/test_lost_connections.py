"""An error of the actor whose ranks are all there: is it one of their connections?"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.cluster.actors import Actors, RanksLost

GLOO = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:27805: aborted"


@pytest.fixture
def actors(tmp_path: Path) -> Actors:
    """An actor of which no rank is asked."""
    made = Actors.__new__(Actors)
    made.ranks, made._logs = [], tmp_path
    return made


def test_a_broken_connection_counts_as_lost_ranks(actors: Actors, tmp_path: Path) -> None:
    with pytest.raises(RanksLost, match=rf"(?s)a connection .* broke.*pair\.cc:537.*{tmp_path}"), actors.losses_named():
        raise RuntimeError(f"a call failed\n{GLOO}")


def test_another_error_stays_what_it_is(actors: Actors) -> None:
    with pytest.raises(RuntimeError, match="shape") as raised, actors.losses_named():
        raise RuntimeError("a wrong shape")
    assert not isinstance(raised.value, RanksLost)
