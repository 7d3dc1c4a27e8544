"""The arithmetic of the benchmarks of growth and of changed weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.changed_weights import compare
from benchmarks.growth import LIMIT, exponent, orders_to, partition_over

KEPT = Path("benchmarks/results/growth.json")


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_is_found_from_the_upper_half(power: float) -> None:
    """Fixed costs hide the growth at small sizes."""
    sizes = [1, 4, 16, 64, 256, 1024]
    times = [1.0 + size**power for size in sizes]
    assert exponent(sizes, times) == pytest.approx(power, abs=0.02)


def test_every_line_of_the_kept_growth_grows_no_faster_than_its_work() -> None:
    sweeps = json.loads((KEPT).read_text())["sweeps"]
    for found in sweeps.values():
        for name, times in found["seconds"].items():
            assert found["exponents"][name] == pytest.approx(exponent(found["sizes"], times))
            assert found["exponents"][name] <= LIMIT, name


def test_sweeps_measure_something() -> None:
    assert partition_over(1)["partition"] > 0 and orders_to(1)["weight sync's orders"] > 0


def test_changed_weights_are_counted_after_rounding() -> None:
    """Between 1 and 2, bf16 numbers are 2^-7 apart: a quarter of that changes nothing here, three quarters do."""
    before = {"a": torch.ones(4), "b": torch.full((12,), 1.0)}
    after = {"a": torch.ones(4) + 2**-9, "b": torch.cat([torch.ones(9), torch.full((3,), 1.0 + 3 * 2**-9)])}
    found = compare(before, after)
    assert found["changed"] == 3 / 16 and found["most_in_a_tensor"] == 3 / 12
    assert found["expected"] == pytest.approx((4 * 0.25 + 3 * 0.75) / 16)
