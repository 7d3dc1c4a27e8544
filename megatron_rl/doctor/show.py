"""Findings as a table, as they come."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.doctor.finding import Finding

STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red", "skipped": "dim"}


def show(findings: Iterable[Finding], console: Console) -> bool:
    """Whether nothing failed. Tells each check while it waits for it."""
    table = Table("check", "", "found", box=SIMPLE_HEAD)
    failures = 0
    with console.status("looking") as status:
        for finding in findings:
            status.update(f"after {finding.check}")
            failures += finding.state == "failure"
            said = Text(finding.found)
            if finding.remedy and finding.state != "ok":
                said.append(f"\n{finding.remedy}", "italic")
            table.add_row(finding.check, Text(finding.state, STYLES[finding.state]), said)
    console.print(table)
    console.print(f"{failures} failed" if failures else "nothing found that would stop a run")
    return failures == 0
