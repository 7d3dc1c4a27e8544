"""The figures of sampled tokens in the Lp-Reg paper (arXiv 2510.03222), from the rollout dumps of a run.

The traces of a figure are in plotly's format. The page replaces a colour such as `@c2` or `@soft` by that of its theme.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .tokens import Array, TokenTable, Vocabulary, class_of_tokens

VIOLIN_POINTS = 400
SCATTER_POINTS = 2500
CLOUD_WORDS = 50
LOWEST, HIGHEST = 0.01, 0.01
"""Fractions of tokens in the two word clouds, least probable and highest entropy, as in the paper."""
UNLIKELY = 0.1
"""Probability below which a candidate counts as an unlikely one, as in the paper."""
FEW = 60
"""Number of values of a class, over all steps, below which a violin also shows its values as points."""
FLOOR = 1e-8
"""Smallest probability that is drawn, because a logarithmic axis has no zero."""

Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure in plotly's format."""

    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 320
    """In pixels, without the legend."""


@dataclass(frozen=True)
class Cloud:
    """A word cloud, the most frequent words first."""

    title: str
    words: list[tuple[str, int, int]]
    """Text, count, and index of the word class (-1 for none) of each word."""


def violins(tables: Sequence[TokenTable], vocabulary: Vocabulary, classes: Classes) -> Figure:
    """Draws the distribution of the sampled probability of each word class at several steps."""
    traces = []
    for index, name in enumerate(classes):
        x: list[str] = []
        y: list[float] = []
        for table in tables:
            chosen = class_of_tokens(table.ids, vocabulary, classes) == index
            values = _log10(_sample(table.log_probs[chosen], VIOLIN_POINTS))
            x += [f"step {table.step}"] * len(values)
            y += _digits(values)
        if x:
            traces.append(_violin(name, x, y, index, side="both" if len(classes) != 2 else _SIDES[index]))
    return Figure(
        "Probability of word classes when sampled",
        "Probability of these words under the policy when it sampled them. Lp-Reg aims to keep rare words alive. A "
        "violin that vanishes means that a class has died out, one that stays at 1 that it has become a habit. The "
        "line in a violin is its mean.",
        traces,
        {
            "violinmode": "overlay" if len(classes) == 2 else "group",
            "violingap": 0.1,
            "yaxis": _probability_axis(min((value for trace in traces for value in trace["y"]), default=0.0)),
            "xaxis": {
                "categoryorder": "array",
                "categoryarray": [f"step {table.step}" for table in sorted(tables, key=lambda table: table.step)],
                "range": [-0.5, len(tables) - 0.5],
            },
        },
    )


_SIDES = ("negative", "positive")


def _violin(name: str, x: list[str], y: list[float], color: int, side: str) -> dict[str, Any]:
    return {
        "type": "violin",
        "name": name,
        "x": x,
        "y": y,
        "side": side,
        # A violin of a few values is hardly visible: such values are drawn as points.
        "points": "all" if len(y) < FEW else False,
        "pointpos": 0,
        "marker": {"size": 4, "color": f"@c{color}"},
        "scalemode": "width",
        "width": 0.8,
        "spanmode": "hard",
        "meanline": {"visible": True},
        "line": {"color": f"@c{color}", "width": 1.5},
        "hoverinfo": "name",
    }


def scatter(table: TokenTable, vocabulary: Vocabulary, classes: Classes) -> Figure:
    """Draws probability against entropy of the sampled tokens of one step."""
    member = class_of_tokens(table.ids, vocabulary, classes)
    kinds = [
        ("other tokens", (member < 0) & ~table.selected, "@soft", 4, 0.35),
        ("selected by the loss", (member < 0) & table.selected, "@text", 6, 0.9),
        *((name, member == index, f"@c{index}", 6, 0.9) for index, name in enumerate(classes)),
    ]
    traces = []
    for name, chosen, color, size, opacity in kinds:
        rows = _sample(np.flatnonzero(chosen & np.isfinite(table.entropy)), SCATTER_POINTS // 2)
        if len(rows):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": _digits(np.maximum(np.exp(table.log_probs[rows]), FLOOR)),
                    "y": _digits(table.entropy[rows]),
                    "text": [vocabulary.text(int(token)) for token in table.ids[rows]],
                    "marker": {
                        "color": color,
                        "size": size,
                        "opacity": opacity,
                        "symbol": "square-open" if name == "selected by the loss" else "circle",
                    },
                    "hovertemplate": "%{text}<br>p %{x:.3g}, entropy %{y:.3g}",
                }
            )
    return Figure(
        f"Probability and entropy, step {table.step}",
        "Each point is a sampled token; a square marks one that the loss selects, unless it is in a word class. Low "
        "probability and high entropy differ: Lp-Reg selects tokens by low probability, 80/20 by high entropy.",
        traces,
        {
            "hovermode": "closest",
            "xaxis": {
                "type": "log",
                "dtick": 1,
                "exponentformat": "power",
                "title": {"text": "probability when sampled"},
            },
            "yaxis": {"title": {"text": "entropy, nats"}},
        },
    )


def clouds(table: TokenTable, vocabulary: Vocabulary, classes: Classes) -> list[Cloud]:
    """Returns the clouds of the words among the least probable and the highest-entropy tokens of one step."""
    found = [
        Cloud(f"Least probable 1 %, step {table.step}", _words(table, -table.log_probs, LOWEST, vocabulary, classes))
    ]
    if np.isfinite(table.entropy).any():
        found.append(
            Cloud(f"Highest entropy 1 %, step {table.step}", _words(table, table.entropy, HIGHEST, vocabulary, classes))
        )
    return found


def _words(
    table: TokenTable, score: Array, share: float, vocabulary: Vocabulary, classes: Classes
) -> list[tuple[str, int, int]]:
    """Returns the words of the tokens with the highest finite scores."""
    known = np.flatnonzero(np.isfinite(score))
    count = max(1, int(share * len(known))) if len(known) else 0
    top = known[np.argsort(-score[known], kind="stable")[:count]]
    ids, counts = np.unique(table.ids[top], return_counts=True)
    member = class_of_tokens(ids, vocabulary, classes)
    rows = [
        (vocabulary.text(int(token)).strip() or "␣", int(n), int(kind))
        for token, n, kind in zip(ids, counts, member, strict=True)
    ]
    return sorted(rows, key=lambda row: (-row[1], row[0]))[:CLOUD_WORDS]


@dataclass(frozen=True)
class ClassCurves:
    """One value per word class and step of one run; None for a missing value."""

    steps: list[int] = field(default_factory=list)
    values: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        self.steps.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(None if value is None else float(f"{value:.4g}"))


def frequency(ids_of_steps: Iterable[tuple[int, Array]], vocabulary: Vocabulary, classes: Classes) -> ClassCurves:
    """Returns the share of sampled tokens in each class. ids_of_steps: (step, [T] token ids)."""
    curves = ClassCurves()
    for step, ids in ids_of_steps:
        member = class_of_tokens(ids, vocabulary, classes)
        curves.add(step, {name: float((member == i).mean()) if len(ids) else 0.0 for i, name in enumerate(classes)})
    return curves


def candidate_probability(
    candidates: Iterable[tuple[int, Array, Array]], vocabulary: Vocabulary, classes: Classes
) -> ClassCurves:
    """Returns the mean probability of each class as the next token, over candidates below `UNLIKELY`.

    candidates: (step, [n] token ids, [n] log-probs), with the recorded candidates of all positions in one array.
    """
    curves = ClassCurves()
    for step, ids, log_probs in candidates:
        p, member = np.exp(log_probs), class_of_tokens(ids, vocabulary, classes)
        chosen = {name: p[(member == i) & (p < UNLIKELY)] for i, name in enumerate(classes)}
        curves.add(step, {name: float(found.mean()) if len(found) else None for name, found in chosen.items()})
    return curves


def frequency_figure(runs: Sequence[tuple[str, ClassCurves]]) -> Figure:
    caption = "Share of sampled tokens, from the rollout dumps." + _dashes_in_words(runs)
    return Figure(
        "Frequency of word classes",
        caption,
        _class_lines(runs),
        {"xaxis": {"title": {"text": "step"}}, "yaxis": _axis("share of tokens")},
    )


def candidate_figure(runs: Sequence[tuple[str, ClassCurves]]) -> Figure:
    return Figure(
        "Probability of word classes as unlikely candidates",
        f"Mean next-token probability of words among the 64 most likely candidates with less than {UNLIKELY:g}, from "
        "the recorded candidates. It shows whether a class stays alive even if it is not sampled."
        + _dashes_in_words(runs),
        _class_lines(runs),
        {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": _axis("probability") | {"type": "log", "exponentformat": "power", "dtick": "D2"},
        },
    )


def _axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "rangemode": "tozero"}


def _dashes_in_words(runs: Sequence[tuple[str, ClassCurves]]) -> str:
    """Returns what the dashes mean in a figure of several runs, where colours stand for runs."""
    names = dict.fromkeys(name for _, curves in runs for name in curves.values)
    if len(runs) == 1 or len(names) < 2:
        return ""
    return " " + " ".join(f"{_IN_WORDS[i % len(_IN_WORDS)]}: {name}." for i, name in enumerate(names))


_DASHES = ("solid", "dash", "dot", "dashdot")
_IN_WORDS = ("Solid", "Dashed", "Dotted", "Dash and dot")


def _class_lines(runs: Sequence[tuple[str, ClassCurves]]) -> list[dict[str, Any]]:
    """Returns one line per run and class. Colours show runs and dashes classes; for one run, colours show classes."""
    names = list(dict.fromkeys(name for _, curves in runs for name in curves.values))
    shown: set[str] = set()
    lines: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name if len(runs) == 1 else label,
            "legendgroup": name if len(runs) == 1 else label,
            "x": curves.steps,
            "y": values,
            "line": {
                "color": f"@c{names.index(name) if len(runs) == 1 else number}",
                "dash": "solid" if len(runs) == 1 else _DASHES[names.index(name) % len(_DASHES)],
                "width": 2,
            },
            "marker": {"size": 5},
            "hovertemplate": "%{y:.4~g}" + ("" if len(runs) == 1 else f" ({name})"),
        }
        for number, (label, curves) in enumerate(runs)
        for name, values in curves.values.items()
        if any(values)
    ]
    for line in lines:  # a name stands in the legend once
        line["showlegend"] = line["name"] not in shown
        shown.add(str(line["name"]))
    return lines


def _probability_axis(lowest: float) -> dict[str, Any]:
    """An axis of log10(probability) down to `lowest`, with more ticks the fewer decades it has."""
    steps = (1.0,) if lowest < -3 else (1.0, 0.5, 0.2)
    values = [step * 10.0**decade for decade in range(0, -9, -1) for step in steps]
    return {
        "title": {"text": "probability when sampled"},
        "tickvals": [float(np.log10(value)) for value in values],
        "ticktext": [f"{value:g}" for value in values],
    }


def _log10(log_probs: Array) -> Array:
    return np.maximum(log_probs / np.log(10), np.log10(FLOOR))


def _sample(values: Array, count: int) -> Array:
    """Returns at most `count` of the values, evenly spaced, so that a report is reproducible."""
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).astype(np.int64)]


def _digits(values: Array) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
