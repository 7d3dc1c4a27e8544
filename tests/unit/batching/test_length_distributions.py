"""The partition meets the targets of `benchmarks/batching.py` on realistic length distributions."""

from __future__ import annotations

import pytest

from benchmarks.batching import CASES, IMBALANCE, PADDING, SPREADS, case, draw

EVEN_LENGTH = 30_000.0


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("rows", "ranks"), CASES)
def test_replicas_have_equal_work_and_little_padding(rows: int, ranks: int, spread: float) -> None:
    found = case(draw(rows, spread, seed=99), ranks, EVEN_LENGTH)
    assert found["imbalance"] <= max(IMBALANCE, found["bound"])
    assert found["padding"] <= PADDING
    assert found["imbalance"] < 0.2 * found["imbalance_in_order"]
