from __future__ import annotations

import json
import random

import numpy as np
import torch

from megatron_rl.checkpoint import rng


def draw() -> list[float]:
    """From every source; odd counts leave half of a pair of normal numbers behind in Python's and numpy's."""
    numbers = [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(np.random.rand())]
    return [*numbers, *torch.randn(3).tolist()]


def test_every_source_goes_on_where_it_was() -> None:
    draw()
    captured = json.loads(json.dumps(rng.capture()))
    expected = [draw(), draw()]
    assert expected[0] != expected[1]
    rng.restore(captured)
    assert [draw(), draw()] == expected


def test_a_fresh_state_comes_back_too() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    captured = rng.capture()
    expected = draw()
    rng.restore(captured)
    assert draw() == expected


def test_megatrons_named_states_come_back_to_their_owner() -> None:
    states = {"model-parallel-rng": torch.arange(16, dtype=torch.uint8)}
    restored = rng.restore(json.loads(json.dumps(rng.capture(states))))
    assert {name: state.tolist() for name, state in restored.items()} == {"model-parallel-rng": list(range(16))}
