"""The kept outcomes of faults, and their table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Returns the outcomes so far. A last line that was not finished is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def kept(folder: Path) -> dict[str, Any]:
    """Returns the table of all outcomes in a folder: those of runs, and those of damaged files that were only read."""
    return {"runs": summary(read(folder / "outcomes.jsonl")), "files alone": summary(read(folder / "files.jsonl"))}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts faults by kind, target, phase and outcome, and lists those that the run did not get over."""
    faults = [row for row in rows if row["kind"] != "none"]
    return {
        "faults": len(faults),
        "runs": len({row["episode"] for row in rows}),
        "equal": sum(row["verdict"] == "equal" for row in faults),
        "by kind": _counts(row["kind"] for row in faults),
        "by kind and target": _counts(f"{row['kind']}: {row['target']}" for row in faults),
        "by phase": _counts(row["phase"] for row in faults),
        "by outcome": _counts(row["effect"] for row in faults),
        "not equal": [row for row in rows if row["verdict"] != "equal"],
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
