"""The findings of the checks, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

State = Literal["ok", "warning", "failure", "skipped"]
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check: one row of the table."""

    check: str
    state: State
    found: str
    remedy: str = ""
    """What to do about a failure or a warning, or why a check was skipped."""


def judged(check: str, good: bool, found: str, remedy: str, *, otherwise: State = "failure") -> Finding:
    """Returns an ok finding if `good`, else one of state `otherwise` with the remedy."""
    return Finding(check, "ok", found) if good else Finding(check, otherwise, found, remedy)


def show(findings: Iterable[Finding], console: Console) -> bool:
    """Print the findings as a table, naming the last check while it waits for the next one.

    Returns whether no check failed.
    """
    table = Table("check", "", "found", box=SIMPLE_HEAD)
    failures = 0
    with console.status("checking") as status:
        for finding in findings:
            status.update(f"checked: {finding.check}")
            failures += finding.state == "failure"
            text = Text(finding.found)
            if finding.remedy and finding.state != "ok":
                text.append(f"\n{finding.remedy}", "italic")
            table.add_row(finding.check, Text(finding.state, STYLES[finding.state]), text)
    console.print(table)
    console.print(f"{failures} failed" if failures else "nothing found that would stop a run")
    return failures == 0
