"""What came of the session's steps, as JSON and as a section of a page."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


@dataclass
class Case:
    """One test of a step."""

    name: str
    outcome: str
    """passed, failed or skipped."""
    seconds: float
    measured: dict[str, str] = field(default_factory=dict)
    """What the test recorded with `record_property`."""
    message: str = ""


@dataclass
class Answer:
    """What came of a step."""

    name: str
    question: str
    outcome: str
    """passed, failed, ran out of time, left out or judged only by a GPU."""
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    reason: str = ""


def read(report: Path) -> list[Case]:
    """Returns the cases of pytest's JUnit report."""
    if not report.stat().st_size:
        return []
    cases = []
    for node in ElementTree.parse(report).iter("testcase"):
        outcome, message = "passed", ""
        for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (found := node.find(kind)) is not None:
                outcome, message = name, (found.get("message") or "")[:500]
        measured = {item.get("name", ""): item.get("value", "") for item in node.iter("property")}
        cases.append(Case(node.get("name", ""), outcome, float(node.get("time", 0)), measured, message))
    return cases


def write(out: Path, machine: dict[str, Any], answers: list[Answer], seconds: float) -> None:
    found = {"machine": machine, "seconds": round(seconds, 1), "steps": [asdict(answer) for answer in answers]}
    (out / "session.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "session.md").write_text(page(machine, answers, seconds))


def page(machine: dict[str, Any], answers: list[Answer], seconds: float) -> str:
    """Returns a section of a page in Markdown."""
    where = "Rehearsed on a CPU: nothing here was judged by a GPU" if machine["rehearsed"] else f"On {machine['gpu']}"
    versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key not in ("gpu", "rehearsed"))
    lines = [f"{where}, in {seconds / 60:.1f} minutes ({versions}).", ""]
    lines += ["| question | answer | measured |", "|---|---|---|"]
    for answer in answers:
        counts = Counter(case.outcome for case in answer.cases)
        result = f"{answer.outcome}, {counts['passed']} tests" if answer.cases else answer.outcome
        result += f", {counts['skipped']} skipped" if counts["skipped"] else ""
        found = [f"{name}: {value}" for case in answer.cases for name, value in case.measured.items()]
        lines.append(f"| {answer.question} | {result} | {'; '.join(found or answer.reason.splitlines()[:1])} |")
    return "\n".join(lines) + "\n"
