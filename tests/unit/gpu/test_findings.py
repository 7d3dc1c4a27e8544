"""The table of findings in docs/gpu.md is complete, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FINDINGS = 28
"""27 that were found by reading the sources of upstreams, and one that came later."""
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/gpu.md").read_text().partition("## The findings")[2].splitlines()
    if re.match(r"\| \d", line)
]
"""Of each row: finding, what was done, how it is held, what only a GPU can judge."""


def test_every_finding_has_one_row_of_four_cells() -> None:
    numbers = [int(number) for row in ROWS for number in re.match(r"[\d, ]+", row[0])[0].split(",")]  # type: ignore[index]
    assert sorted(numbers) == list(range(1, FINDINGS + 1))
    assert all(len(row) == 4 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].split(" ")[0].strip(","))
def test_what_holds_a_finding_exists(row: list[str]) -> None:
    tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`([\w/]+\.py|tests/\w+)`", row[2])
    assert named, "a finding is held by a test"
    for name in named:
        assert (ROOT / name).exists() if "/" in name else name in tests, name
