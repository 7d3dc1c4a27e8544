"""The charts of a report, and the metrics that each of them shows.

A metric without values has no line, and a chart without lines is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.observability.metrics import Row, metric_names, series
from megatron_rl.observability.summary import is_probe, suite_metrics


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart, or one part of its bars."""

    name: str
    x: list[int] | list[str]
    """Steps, or the labels of the bars in a bar chart."""
    y: list[float]
    color: int
    """Index into the page's palette. In every chart, 0 is training, 1 the first suite, and so on."""
    dash: str = "solid"
    kind: str = ""
    """What the line shows of a run, if it shares the chart with other runs; its dash then stands for this kind."""
    suite: str = ""
    """Suite of an evaluation metric."""
    error: list[float] | None = None
    """Half-widths of the 95 % intervals of y."""
    smooth: list[float] | None = None
    """Moving average, drawn as the main line with y as a faint line behind it."""
    low: list[float] | None = None
    """Lowest value over the seeds, the lower edge of the band around y."""
    high: list[float] | None = None
    """Highest value over the seeds, the upper edge of the band around y."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart with its caption."""

    title: str
    caption: str
    lines: list[Line] = field(default_factory=list)
    dashes: dict[str, str] = field(default_factory=dict)
    """What each dash stands for, if dashes differ."""
    unit: str = ""
    stacked: bool = False
    bars: bool = False
    log: bool = False
    """Whether the axis is logarithmic, for values that span orders of magnitude."""
    several: bool = False
    """Whether colours stand for runs and dashes for kinds of lines."""
    only_above_zero: bool = False
    """Whether a report leaves the chart out if all its values are zero."""

    @property
    def is_shown(self) -> bool:
        return not self.only_above_zero or any(value > 0 for line in self.lines for value in line.high or line.y)

    @property
    def words(self) -> str:
        """The caption, with the meaning of those dashes that the chart has."""
        drawn = {line.dash for line in self.lines}
        meanings = [f"{IN_WORDS[dash]}: {what}." for dash, what in self.dashes.items() if dash in drawn]
        intervals = ["Bars: 95 % intervals over problems."] if any(line.error for line in self.lines) else []
        return " ".join([self.caption, *meanings, *intervals])


IN_WORDS = {"solid": "Solid", "dash": "Dashed", "dot": "Dotted", "dashdot": "Dash and dot"}
DASHES = tuple(IN_WORDS)
TRAINING_OR_EVALUATION = {"solid": "training", "dash": "evaluation"}


def build_charts(rows: Sequence[Row]) -> list[Chart]:
    """Returns every chart for which the rows have data, in reading order."""
    return [chart for make in _CHARTS if (chart := make(rows)).lines]


def window(points: int) -> int:
    """Returns the window of a line's moving average: a twentieth of its points, at most 50."""
    return max(1, min(50, points // 20))


def _train(rows: Sequence[Row], name: str, metric: str, color: int = 0, dash: str = "solid") -> list[Line]:
    x, y = series(rows, metric)
    return [Line(name, x, y, color, dash, kind=name, smooth=_smooth(y))] if x else []


def _evaluated(rows: Sequence[Row], start: str, name: str = "", dash: str = "solid") -> list[Line]:
    """Returns one line per suite and metric whose name starts with `start`."""
    lines = []
    for index, (suite, metrics) in enumerate(suite_metrics(rows).items()):
        for metric in metrics:
            if metric.startswith(start):
                x, y = series(rows, f"eval/{suite}/{metric}")
                kind = name or metric
                lines.append(Line(f"{suite} {kind}", x, y, index + 1, dash, kind, suite))
    return lines


def _smooth(values: list[float]) -> list[float] | None:
    """Returns the exponential moving average, corrected for its start, or None for a line too short to need one."""
    span = window(len(values))
    if span < 2:
        return None
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth


def _spans(lines: Sequence[Line]) -> bool:
    """Returns whether the lines need a logarithmic axis: all values above zero and over more than a factor of 30."""
    values = [value for line in lines for value in (line.smooth or line.y)]
    return bool(values) and min(value for line in lines for value in line.y) > 0 and max(values) > 30 * min(values)


def _reward(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Reward",
        "Mean reward of a step's rollouts, which training maximises.",
        _train(rows, "reward", "reward/mean"),
        unit="per response",
    )


def _failures(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Samples without a reward",
        "Samples whose grading took too long or ended in an error. Baseline and loss leave them out.",
        _train(rows, "timed out", "reward/timeout_fraction")
        + _train(rows, "error", "reward/error_fraction", color=1, dash="dash"),
        {"solid": "timed out", "dash": "error"},
        unit="share of 1",
        only_above_zero=True,
    )


def _accuracy(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Accuracy and pass@k",
        "Evaluation on held-out problems. pass@k falls when exploration is lost.",
        _evaluated(rows, "avg@") + _evaluated(rows, "pass@", dash="dash"),
        {
            "solid": "share of correct answers (avg@k)",
            "dash": "share of problems with at least one correct answer in k (pass@k)",
        },
        unit="share of 1",
    )


def _entropy(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Entropy",
        "Uncertainty of the policy about its next token. A fall towards zero means that exploration is lost.",
        _train(rows, "training, token mean", "entropy/token_mean")
        + _train(rows, "training, sequence mean", "entropy/sequence_mean", dash="dot")
        + _evaluated(rows, "entropy", "evaluation", dash="dash"),
        {"solid": "mean over the tokens of training", "dot": "mean over its responses", "dash": "evaluation"},
        unit="nats per token",
    )


def _probes(rows: Sequence[Row]) -> Chart:
    lines = []
    for index, (suite, metrics) in enumerate(suite_metrics(rows).items()):
        for number, metric in enumerate(filter(is_probe, metrics)):
            x, y = series(rows, f"eval/{suite}/{metric}")
            lines.append(Line(f"{suite} {metric}", x, y, index + 1, DASHES[number % len(DASHES)], metric, suite))
    return Chart(
        "Probes",
        "Probabilities that the configuration tracks in every evaluation: that one token comes after another, such as "
        "a retry word after a failed attempt.",
        lines,
        unit="probability",
    )


def _response_length(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Response length",
        "Mean length of a response.",
        _train(rows, "training", "response_length/mean") + _evaluated(rows, "response_length", "evaluation", "dash"),
        TRAINING_OR_EVALUATION,
        unit="tokens",
    )


def _truncated(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Truncated responses",
        "Responses that reached the token limit before they ended. If the share grows, raise the limit.",
        _train(rows, "training", "response_length/truncated_fraction")
        + _evaluated(rows, "truncated_fraction", "evaluation", "dash"),
        TRAINING_OR_EVALUATION,
        unit="share of 1",
    )


def _turns(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Turns and tool calls",
        "Calls of the model, and of tools, in a rollout of the agent; and tool calls that end in an error.",
        _train(rows, "turns", "agent/turns_mean")
        + _train(rows, "tool calls", "agent/tool_calls_mean", color=1, dash="dash")
        + _train(rows, "tool errors", "agent/tool_errors_mean", color=2, dash="dot")
        + _evaluated(rows, "tool_calls_mean", "evaluation, tool calls", "dashdot"),
        {"solid": "turns", "dash": "tool calls", "dot": "tool errors", "dashdot": "tool calls in evaluations"},
        unit="per rollout",
    )


def _delta(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "delta", "lpreg/delta")
    return Chart(
        "Lp-Reg threshold delta",
        "Tokens sampled with a lower probability than this are candidates for protection.",
        lines,
        unit="probability",
        log=_spans(lines),
    )


def _selected(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Selected tokens",
        "Share of sampled tokens that the regulariser protects. Zero means that the regulariser has no effect.",
        _train(rows, "selected", "lpreg/selected_fraction"),
        unit="share of 1",
    )


def _kept(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Kept tokens",
        "Share of tokens that the filter of the proxy distribution keeps. The others count as noise.",
        _train(rows, "kept", "lpreg/kept_fraction"),
        unit="share of 1",
    )


def _regularizer(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Strength of the regulariser",
        "What the regulariser adds on the tokens that it selects.",
        _train(rows, "KL", "lpreg/kl") + _train(rows, "advantage shift", "lpreg/advantage_shift", color=1, dash="dash"),
        {"solid": "KL divergence from the proxy, in nats", "dash": "mean increase of the advantage"},
    )


def _gap(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "gap", "logprob/rollout_actor_abs_diff")
    return Chart(
        "Rollout and actor log-prob gap",
        "Mean absolute difference of the log-probs of engine and actor for the same token. It should stay small.",
        lines,
        unit="nats",
        log=_spans(lines),
    )


def _gradient(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "gradient norm", "train/grad_norm")
    return Chart("Gradient norm", "Norm before clipping. Spikes indicate instability.", lines, log=_spans(lines))


def _loss(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Loss",
        "Value that the optimizer minimises. In RL it says little about progress.",
        _train(rows, "loss", "train/loss"),
    )


def _memory(rows: Sequence[Row]) -> Chart:
    lines: list[Line] = []
    for metric in metric_names(rows):
        if metric.startswith("memory/"):
            x, y = series(rows, metric)
            name = metric.removeprefix("memory/").removesuffix("_gib").replace("_", " ")
            lines.append(Line(name, x, y, len(lines), DASHES[len(lines) % len(DASHES)], kind=name))
    return Chart("Memory", "Peak memory of one process so far, by kind of process.", lines, unit="GiB")


def _throughput(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Throughput",
        "Sampled tokens over the time of a complete step.",
        _train(rows, "tokens/s", "perf/tokens_per_second"),
        unit="tokens per second",
    )


def _operations(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Operations of the actor",
        "Model operations during scoring and training.",
        _train(rows, "TFLOPS per rank", "perf/tflops_per_second_per_rank"),
        unit="TFLOP per second and rank",
    )


def _phases(rows: Sequence[Row]) -> Chart:
    lines: list[Line] = []
    for metric in metric_names(rows):
        phase = metric.removeprefix("perf/").removesuffix("_seconds")
        if metric.startswith("perf/") and metric.endswith("_seconds") and phase != "step":
            x, y = series(rows, metric)
            lines.append(Line(phase.replace("_", " "), x, y, len(lines), kind=phase))
    return Chart("Seconds per phase", "Time of each phase of a step.", lines, unit="seconds", stacked=True)


_CHARTS: tuple[Callable[[Sequence[Row]], Chart], ...] = (
    _reward,
    _failures,
    _accuracy,
    _entropy,
    _probes,
    _response_length,
    _truncated,
    _turns,
    _delta,
    _selected,
    _kept,
    _regularizer,
    _gap,
    _gradient,
    _loss,
    _throughput,
    _operations,
    _memory,
    _phases,
)


def as_json(chart: Chart) -> dict[str, Any]:
    """Returns the data for the page's script. Values have six digits, which is more than a screen resolves."""
    return {
        "stacked": chart.stacked,
        "bars": chart.bars,
        "log": chart.log,
        "unit": chart.unit,
        "several": chart.several,
        "lines": [
            {
                "name": line.name,
                "x": line.x,
                "y": _six_digits(line.smooth or line.y),
                "raw": None if line.smooth is None else _six_digits(line.y),
                "color": line.color,
                "dash": line.dash,
                "kind": line.kind,
                "error": _six_digits(line.error),
                "low": _six_digits(line.low),
                "high": _six_digits(line.high),
            }
            for line in chart.lines
        ],
    }


def _six_digits(values: list[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.6g}") for value in values]
