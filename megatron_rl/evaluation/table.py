"""The table of results that `megatron-rl eval` prints."""

from __future__ import annotations

import math

from rich.table import Table

from .measures import CONFIDENCE, Estimate, Measures, macro


def table_of(measures: dict[str, Measures], title: str) -> Table:
    """Returns a table with one row per suite: percentages, with intervals in brackets."""
    table = Table(
        title=title,
        title_justify="left",
        caption=f"percent; in brackets the {CONFIDENCE:.0%} bootstrap interval over problems",
        caption_justify="left",
    )
    for name in ("suite", "problems", "k", "avg@k", "pass@k", "maj@k", "tokens", "truncated", "not graded"):
        table.add_column(name, justify="left" if name == "suite" else "right", no_wrap=True)
    for name, suite in measures.items():
        several = suite.k > 1
        table.add_row(
            name,
            str(len(suite.problems)),
            str(suite.k),
            _shown(suite.avg),
            _shown(suite.pass_at(suite.k)) if several else "",
            _shown(suite.majority) if several else "",
            f"{suite.response_length:.0f}",
            f"{100 * suite.truncated_fraction:.1f}",
            f"{100 * suite.failed_fraction:.1f}",
        )
    if len(measures) > 1:
        table.add_section()
        table.add_row("macro mean", "", "", _shown(macro(list(measures.values()))), "", "", "", "", "")
    return table


def _shown(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "nothing graded"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
