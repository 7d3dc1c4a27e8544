from __future__ import annotations

import json
import random

import numpy as np
import torch

from megatron_rl.checkpoint import rng


def draw() -> list[float]:
    """Draw from every generator. Odd counts leave one of a pair of normal numbers in those of Python and numpy."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(np.random.rand())]
    return [*numbers, *torch.randn(3).tolist()]


def test_every_generator_continues_where_it_was() -> None:
    draw()
    captured = json.loads(json.dumps(rng.capture()))
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    rng.restore(captured)
    assert [draw(), draw()] == expected


def test_a_freshly_seeded_state_is_restored() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    captured = rng.capture()
    expected = draw()
    rng.restore(captured)
    assert draw() == expected


def test_the_states_of_megatrons_tracker_are_returned() -> None:
    states = {"model-parallel-rng": torch.arange(16, dtype=torch.uint8)}
    restored = rng.restore(json.loads(json.dumps(rng.capture(states))))
    assert {name: state.tolist() for name, state in restored.items()} == {"model-parallel-rng": list(range(16))}
