"""The verdict at the head of a report: sentences that are written from the numbers, with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rl.observability.metrics import Row, series
from megatron_rl.observability.summary import signed, suite_metrics
from megatron_rl.utils.format import counted, number

from .intervals import Difference, difference, per_problem
from .run_data import Group, RunData


def verdict(groups: Sequence[Group]) -> list[str]:
    """Returns what the runs show, most important first; of a single group what changed, of several how they differ.
    The last lines tell of samples without a reward."""
    failures = [line for group in groups for line in _failures(group, f" of {group.label}" if len(groups) > 1 else "")]
    return (_of_one(groups[0]) if len(groups) == 1 else _of_several(groups)) + failures


def _of_several(groups: Sequence[Group]) -> list[str]:
    lines = [line for other in groups[1:] for line in _of_two(groups[0], other)]
    if not lines:
        return ["No suite has been evaluated by two of these methods yet, so nothing can be said of their difference."]
    if min(len(group.runs) for group in groups) < 2:
        lines.append("The intervals are over problems. With one seed of a method, chance between seeds is not in them.")
    return lines


def _of_one(group: Group) -> list[str]:
    lines, single = [], []
    for suite, metrics in suite_metrics(group.runs[0].rows).items():
        for metric in (name for name in metrics if name.startswith(("avg@", "pass@"))):
            steps = _common_steps(group.runs, f"eval/{suite}/{metric}")
            if len(steps) < 2:
                single += [
                    f"{_measure(metric)} on {suite} is {number(_mean(group.runs, f'eval/{suite}/{metric}', step))} at "
                    f"step {step}, the only evaluation."
                    for step in steps
                ]
                continue
            first, last = (_mean(group.runs, f"eval/{suite}/{metric}", steps[i]) for i in (0, -1))
            change = _compared(group.runs, group.runs, suite, metric, steps[-1], steps[0])
            lines.append(f"{_measure(metric)} on {suite} {_moved(first, last, change)} by step {steps[-1]}.")
    rows = group.runs[0].rows
    if not lines:
        lines = single + (_trend(rows, "reward/mean", "The training reward", "") or _few_steps(rows))
    return lines + _trend(rows, "entropy/token_mean", "The entropy of training", " nats")


def _of_two(one: Group, other: Group) -> list[str]:
    """Returns a sentence for each measure that both have, at the last step at which all of their runs have it."""
    lines = []
    for suite, metrics in suite_metrics(one.runs[0].rows).items():
        for metric in (name for name in metrics if name.startswith(("avg@", "pass@"))):
            name = f"eval/{suite}/{metric}"
            steps = _common_steps([*one.runs, *other.runs], name)
            if not steps or steps[-1] == 0:
                continue
            left, right = _mean(one.runs, name, steps[-1]), _mean(other.runs, name, steps[-1])
            found = _compared(other.runs, one.runs, suite, metric, steps[-1], steps[-1])
            against = (
                f"{other.label} has {number(right)}, {one.label} {number(left)}: {_difference(right - left, found)}"
            )
            lines.append(f"{_measure(metric)} on {suite} at step {steps[-1]}: {against}.")
    return lines


def _compared(
    above: Sequence[RunData], below: Sequence[RunData], suite: str, metric: str, step: int, step_below: int
) -> Difference | None:
    sides = ((above, step), (below, step_below))
    return difference(*([per_problem(run, suite, metric, at) for run in runs] for runs, at in sides))


def _moved(first: float, last: float, change: Difference | None) -> str:
    if change is None:
        return f"went from {number(first)} to {number(last)} ({signed(last - first)}, of unknown uncertainty)"
    how = ("rose" if change.value > 0 else "fell") if change.is_clear else "did not change measurably:"
    return f"{how} from {number(first)} to {number(last)} ({signed(last - first)}, {_interval(change)})"


def _difference(value: float, found: Difference | None) -> str:
    if found is None:
        return f"{signed(value)}, of unknown uncertainty"
    clear = "a clear difference" if found.is_clear else "no clear difference"
    return f"{signed(found.value)}, {clear} ({_interval(found)})"


def _interval(found: Difference) -> str:
    return f"95 % interval {signed(found.value - found.half_width)} to {signed(found.value + found.half_width)}"


def _trend(rows: Sequence[Row], metric: str, name: str, unit: str) -> list[str]:
    """Returns a sentence about the means over the first and the last tenth of the steps."""
    values = series(rows, metric)[1]
    tenth = len(values) // 10
    if not tenth:
        return []
    first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    steps = "step" if tenth == 1 else f"{tenth} steps"
    return [f"{name} went from {number(first)} to {number(last)}{unit} (means of the first and the last {steps})."]


def _few_steps(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence about the training reward of a run with too few steps for a trend; nothing before step 1."""
    steps, values = len({row["step"] for row in rows if row["step"] > 0}), series(rows, "reward/mean")[1]
    if not steps:
        return []
    if not values:
        return [f"{counted(steps, 'step')} of training: no reward has been logged."]
    reward = number(values[0]) if len(values) == 1 else f"from {number(values[0])} to {number(values[-1])}"
    return [f"{counted(steps, 'step')} of training, too few to state a trend. The training reward: {reward}."]


def _failures(group: Group, of_group: str) -> list[str]:
    """Returns a sentence about the samples that got no reward, if there were any in a step."""
    parts = []
    for metric, what in (("reward/timeout_fraction", "timed out"), ("reward/error_fraction", "ended in an error")):
        shares = [share for run in group.runs for share in series(run.rows, metric)[1]]
        if any(shares):
            mean, most = number(sum(shares) / len(shares)), number(max(shares))
            parts.append(f"a share of {mean} {what} (mean over the steps, at most {most})")
    return [f"Some samples{of_group} got no reward: {' and '.join(parts)}."] if parts else []


def _measure(metric: str) -> str:
    return f"Accuracy ({metric})" if metric.startswith("avg@") else metric


def _mean(runs: Sequence[RunData], name: str, step: int) -> float:
    values = [value for run in runs for at, value in zip(*series(run.rows, name), strict=True) if at == step]
    return sum(values) / len(values)


def _common_steps(runs: Sequence[RunData], name: str) -> list[int]:
    """Returns the steps at which every run has the metric, in order."""
    return sorted(set.intersection(*(set(series(run.rows, name)[0]) for run in runs)))
