"""Which charts a report has, and what each is drawn from.

Only metrics that exist give a line; a chart without lines is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.observability.metrics import Row, metric_names, series
from megatron_rl.observability.summary import is_probe, suite_metrics


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    x: list[int] | list[str]
    """Steps; in a chart of bars, what each bar stands for."""
    y: list[float]
    color: int
    """Index into the page's palette: 0 is training, 1 the first suite, and so on, the same in every chart."""
    dash: str = "solid"
    smooth: list[float] | None = None
    """The moving average; drawn instead of y, which then stays as a faint line behind it."""
    low: list[float] | None = None
    high: list[float] | None = None
    """Lowest and highest seed, drawn as a band around y, the mean of the seeds."""


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    caption: str
    lines: list[Line] = field(default_factory=list)
    stacked: bool = False
    bars: bool = False
    log: bool = False
    """Logarithmic axis: for values that span orders of magnitude."""


def build_charts(rows: Sequence[Row]) -> list[Chart]:
    """Every chart that the rows have something for, in reading order."""
    return [chart for make in _CHARTS if (chart := make(rows)).lines]


def window(points: int) -> int:
    """How many values the moving average of a line reaches back: a twentieth of them, at most 50."""
    return max(1, min(50, points // 20))


def _train(rows: Sequence[Row], name: str, metric: str, color: int = 0, dash: str = "solid") -> list[Line]:
    x, y = series(rows, metric)
    return [Line(name, x, y, color, dash, _smooth(y))] if x else []


def _evaluated(rows: Sequence[Row], start: str, name: str = "", dash: str = "solid") -> list[Line]:
    """One line a suite and metric whose name starts with `start`."""
    lines = []
    for index, (suite, metrics) in enumerate(suite_metrics(rows).items()):
        for metric in metrics:
            if metric.startswith(start):
                x, y = series(rows, f"eval/{suite}/{metric}")
                lines.append(Line(f"{suite} {name or metric}", x, y, index + 1, dash))
    return lines


def _smooth(values: list[float]) -> list[float] | None:
    """Exponential moving average, corrected for its start; None for lines too short to need one."""
    reach = window(len(values))
    if reach < 2:
        return None
    decay = 1 - 2 / (reach + 1)
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(total / weight)
    return smooth


def _spans(lines: Sequence[Line]) -> bool:
    """Whether a logarithmic axis shows the lines better: all above zero, over more than a factor of 30."""
    values = [value for line in lines for value in (line.smooth or line.y)]
    return bool(values) and min(value for line in lines for value in line.y) > 0 and max(values) > 30 * min(values)


def _reward(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Reward", "Mean reward of the step's rollouts: what training raises.", _train(rows, "reward", "reward/mean")
    )


def _accuracy(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Accuracy and pass@k on held-out problems",
        "Solid: share of right answers (avg@k). Dashed: problems with at least one right answer in k (pass@k), which "
        "falls when exploration dies.",
        _evaluated(rows, "avg@") + _evaluated(rows, "pass@", dash="dash"),
    )


def _entropy(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Entropy",
        "How undecided the policy is about its next token, in nats. A fall towards zero means that exploration dies.",
        _train(rows, "training, token mean", "entropy/token_mean")
        + _train(rows, "training, sequence mean", "entropy/sequence_mean", dash="dot")
        + _evaluated(rows, "entropy", "evaluation"),
    )


def _probes(rows: Sequence[Row]) -> Chart:
    dashes = ("solid", "dash", "dot", "dashdot")
    lines = []
    for index, (suite, metrics) in enumerate(suite_metrics(rows).items()):
        for number, metric in enumerate(filter(is_probe, metrics)):
            x, y = series(rows, f"eval/{suite}/{metric}")
            lines.append(Line(f"{suite} {metric}", x, y, index + 1, dashes[number % len(dashes)]))
    return Chart(
        "Probes",
        "What the configuration asks of every evaluation: the probability of one token after another, such as a retry "
        "word after a failed attempt.",
        lines,
    )


def _response_length(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Response length",
        "Mean number of tokens in a response.",
        _train(rows, "training", "response_length/mean") + _evaluated(rows, "response_length", "evaluation"),
    )


def _truncated(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Truncated responses",
        "Share of responses that hit the token limit before they ended. If it grows, raise the limit.",
        _train(rows, "training", "response_length/truncated_fraction")
        + _evaluated(rows, "truncated_fraction", "evaluation"),
    )


def _delta(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "delta", "lpreg/delta")
    return Chart(
        "Lp-Reg threshold delta",
        "Tokens sampled with a lower probability than this are candidates for protection.",
        lines,
        log=_spans(lines),
    )


def _selected(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Selected tokens",
        "Share of response tokens that the regularizer protects. Zero means that it does nothing.",
        _train(rows, "selected", "lpreg/selected_fraction"),
    )


def _kept(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Kept tokens",
        "Share of tokens that the proxy distribution keeps; the others count as noise.",
        _train(rows, "kept", "lpreg/kept_fraction"),
    )


def _regularizer(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Strength of the regularizer",
        "KL: distance from the proxy on selected tokens. Advantage shift: how much it lifts their advantage.",
        _train(rows, "KL", "lpreg/kl") + _train(rows, "advantage shift", "lpreg/advantage_shift", color=1),
    )


def _gap(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "gap", "logprob/rollout_actor_abs_diff")
    return Chart(
        "Rollout and actor log-prob gap",
        "Mean absolute difference between what the engine and the actor say of the same token. It should stay small.",
        lines,
        log=_spans(lines),
    )


def _gradient(rows: Sequence[Row]) -> Chart:
    lines = _train(rows, "gradient norm", "train/grad_norm")
    return Chart("Gradient norm", "Before clipping. Spikes are a sign of instability.", lines, log=_spans(lines))


def _loss(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Loss", "What the optimizer minimizes; in RL it says little about progress.", _train(rows, "loss", "train/loss")
    )


def _memory(rows: Sequence[Row]) -> Chart:
    lines: list[Line] = []
    for metric in metric_names(rows):
        if metric.startswith("memory/"):
            x, y = series(rows, metric)
            name = metric.removeprefix("memory/").removesuffix("_gib").replace("_", " ")
            lines.append(Line(name, x, y, len(lines)))
    return Chart("Memory", "Highest use of a process so far, in GiB.", lines)


def _throughput(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Throughput", "Tokens per second over the whole step.", _train(rows, "tokens/s", "perf/tokens_per_second")
    )


def _operations(rows: Sequence[Row]) -> Chart:
    return Chart(
        "Operations of the actor",
        "Model operations a second and rank while it scores and trains.",
        _train(rows, "TFLOPS a rank", "perf/tflops_per_second_per_rank"),
    )


def _phases(rows: Sequence[Row]) -> Chart:
    lines: list[Line] = []
    for metric in metric_names(rows):
        phase = metric.removeprefix("perf/").removesuffix("_seconds")
        if metric.startswith("perf/") and metric.endswith("_seconds") and phase != "step":
            x, y = series(rows, metric)
            lines.append(Line(phase.replace("_", " "), x, y, len(lines)))
    return Chart("Seconds per phase", "Where the time of a step goes.", lines, stacked=True)


_CHARTS: tuple[Callable[[Sequence[Row]], Chart], ...] = (
    _reward,
    _accuracy,
    _entropy,
    _probes,
    _response_length,
    _truncated,
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
    """What the page's script draws from; values to six digits, which is more than a screen shows."""
    return {
        "stacked": chart.stacked,
        "bars": chart.bars,
        "log": chart.log,
        "lines": [
            {
                "name": line.name,
                "x": line.x,
                "y": _six_digits(line.smooth or line.y),
                "raw": None if line.smooth is None else _six_digits(line.y),
                "color": line.color,
                "dash": line.dash,
                "low": _six_digits(line.low),
                "high": _six_digits(line.high),
            }
            for line in chart.lines
        ],
    }


def _six_digits(values: list[float] | None) -> list[float] | None:
    return None if values is None else [float(f"{value:.6g}") for value in values]
