"""The figure of what a method does to rare tokens, from the metrics of `algorithm.rarity_metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lpreg.losses.rarity import EDGES
from megatron_rl.observability.metrics import Row, series

from .run_data import Group
from .token_figures import Figure

PREFIX = "lpreg/rarity/"
SIGNS = ("negative", "positive")
MEASURES = {
    "stopped": "share of tokens without gradient",
    "weight": "effective advantage",
    "change": "change of probability",
}
GAP = 0.07
"""Space between the panels, as a share of the figure."""


def means(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the mean over all steps of each metric, by `<sign>/<lower edge>/<measure>`. Steps without such tokens do
    not count."""
    names = [f"{sign}/{edge:g}/{measure}" for sign in SIGNS for edge in EDGES[:-1] for measure in MEASURES]
    values = {name: series(rows, PREFIX + name)[1] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def rarity_figure(groups: Sequence[Group]) -> Figure:
    """Draws each group's means over steps and seeds: a row per measure, a column per sign of the advantage.

    Each group has one line. Without these metrics, the figure has no traces.
    """
    traces = []
    for color, group in enumerate(groups):
        runs = [found for run in group.runs if (found := means(run.rows))]
        for panel, (measure, sign) in enumerate((measure, sign) for measure in MEASURES for sign in SIGNS):
            names = [f"{sign}/{edge:g}/{measure}" for edge in EDGES[:-1]]
            y = [[run[name] for run in runs if name in run] for name in names]
            if any(y):
                traces.append(_line(group.label, panel, [sum(v) / len(v) if v else None for v in y], color))
    seen: set[str] = set()
    for trace in traces:  # a name stands in the legend once
        trace["showlegend"] = trace["name"] not in seen
        seen.add(trace["name"])
    return Figure(
        "What the loss does to rare tokens",
        "Means over all steps, by the probability that a token had when it was sampled. Without gradient: the share of "
        "tokens that a clip or a mask stops. Effective advantage: the weight of a token's log-prob in the gradient. "
        "Change: how far earlier updates on the same rollouts have moved the token's probability; always 0 with one "
        "update per rollout. Left: tokens of responses with a negative advantage, right: with a positive one.",
        traces,
        _layout(),
        height=620,
    )


def _line(name: str, panel: int, y: list[float | None], color: int) -> dict[str, Any]:
    number = "" if panel == 0 else str(panel + 1)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "legendgroup": name,
        "x": [f"{low:g} to {high:g}" for low, high in pairwise(EDGES)],
        "y": [None if value is None else float(f"{value:.4g}") for value in y],
        "xaxis": f"x{number}",
        "yaxis": f"y{number}",
        "line": {"color": f"@c{color}", "width": 2},
        "marker": {"size": 5, "color": f"@c{color}"},
        "hovertemplate": f"%{{y:.3~g}}<extra>{name}</extra>",
    }


def _layout() -> dict[str, Any]:
    layout: dict[str, Any] = {"hovermode": "closest"}
    height = (1 - GAP * (len(MEASURES) - 1)) / len(MEASURES)
    for panel, (row, column) in enumerate((row, column) for row in range(len(MEASURES)) for column in range(2)):
        number = "" if panel == 0 else str(panel + 1)
        top = 1 - row * (height + GAP)
        last = row == len(MEASURES) - 1
        layout[f"xaxis{number}"] = {
            "domain": [0, 0.48] if column == 0 else [0.54, 1],
            "anchor": f"y{number}",
            "showticklabels": last,
            "tickangle": -40,
            "categoryorder": "array",
            "categoryarray": [f"{low:g} to {high:g}" for low, high in pairwise(EDGES)],
            "title": {"text": f"probability, {SIGNS[column]} advantage" if last else ""},
        }
        layout[f"yaxis{number}"] = {
            "domain": [max(0.0, top - height), top],
            "anchor": f"x{number}",
            "nticks": 5,
            "title": {"text": list(MEASURES.values())[row] if column == 0 else "", "font": {"size": 11}},
            **({"rangemode": "tozero"} if row == 0 else {"zeroline": True}),
        }
    return layout
