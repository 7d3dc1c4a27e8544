"""Warnings about common failures of RLVR runs, each with the threshold that was passed and a remedy."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import UserError
from megatron_rl.observability.method_rules import Watched, filters, less_entropy, more_entropy, selections
from megatron_rl.observability.metrics import LONGEST_LINE, Row, metric_names
from megatron_rl.utils.bounded import parse_json, read_lines
from megatron_rl.utils.files import atomically, write_error
from megatron_rl.utils.format import number

if TYPE_CHECKING:
    from megatron_rl.config.algorithm import AlgorithmSettings
    from megatron_rl.config.observability import DiagnosisSettings

FILE_NAME = "warnings.jsonl"


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning."""

    step: int
    """First step at which the condition holds."""
    name: str
    what: str
    """The value and the threshold that it passed."""
    remedy: str

    def __str__(self) -> str:
        return f"warning {self.name}: {self.what}. {self.remedy}"


_FINDING = TypeAdapter(Finding)


class Values:
    """The values of a metric so far, of which only the first and the last `window` are kept: a run may be long."""

    def __init__(self, window: int) -> None:
        self.count, self.best = 0, -math.inf
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        if len(self.first) < (self.last.maxlen or 0):
            self.first.append(value)
        self.last.append(value)
        self.count, self.best = self.count + 1, max(self.best, value)


class History:
    """The finite values of every metric so far."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._values: dict[str, Values] = {}

    def add(self, row: Row) -> None:
        """Adds the metrics of the next step."""
        for name in metric_names([row]):
            self._values.setdefault(name, Values(self._window)).add(float(row[name]))

    def of(self, metric: str) -> Values:
        return self._values.get(metric) or Values(self._window)

    def last(self, metric: str) -> list[float]:
        """Returns the last `window` values; none if there are fewer."""
        values = self.of(metric)
        return list(values.last) if values.count >= self._window else []

    def evaluations(self) -> list[Values]:
        """Returns the values of every suite's accuracy."""
        return [values for name, values in self._values.items() if name.startswith("eval/") and "/avg@" in name]


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition that a run should not be in."""

    name: str
    holds: Callable[[History, DiagnosisSettings], str | None]
    """Returns what is wrong after the steps so far, or None."""
    remedy: str


class Diagnosis:
    """Checks the metrics of every step.

    A warning is given when its condition starts to hold. It is given again only after the condition has stopped
    holding in between.
    """

    def __init__(
        self, folder: Path, settings: DiagnosisSettings, algorithm: AlgorithmSettings, rows: Sequence[Row]
    ) -> None:
        """Continues from `rows`, the metrics that a resumed run has logged before.

        Warnings of later steps are removed from the file.
        """
        self._rules = rules_of(algorithm)
        self._path = folder / FILE_NAME
        self._settings = settings
        self._history = History(settings.window)
        for row in sorted(rows, key=lambda row: int(row["step"])):
            self._history.add(row)
        self._holding = {rule for rule in self._rules if rule.holds(self._history, settings)}
        last = max((row["step"] for row in rows), default=-1)
        kept = [finding for finding in read_findings(folder) if finding.step <= last]
        if self._path.exists():
            with atomically(self._path) as partial:
                partial.write_text("".join(_line(finding) for finding in kept), encoding="utf-8")

    def step(self, step: int, metrics: Mapping[str, float | None]) -> list[Finding]:
        """Returns the warnings that start with this step, and appends them to warnings.jsonl in the run folder."""
        self._history.add({"step": step, **metrics})
        what = {rule: text for rule in self._rules if (text := rule.holds(self._history, self._settings))}
        started = [
            Finding(step, rule.name, text, rule.remedy) for rule, text in what.items() if rule not in self._holding
        ]
        self._holding = set(what)
        if started:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(map(_line, started))
            except OSError as error:
                raise write_error(self._path, error) from error
        return started


def read_findings(folder: Path) -> list[Finding]:
    """Returns the warnings of a run so far, by step. An incomplete last line is ignored."""
    path = folder / FILE_NAME
    lines = read_lines(path, LONGEST_LINE) if path.exists() else []
    return [_finding(line, f"{path}, line {number}") for number, line in lines if line.endswith(b"\n")]


def _finding(line: bytes, where: str) -> Finding:
    try:
        return _FINDING.validate_python(parse_json(line, where))
    except ValidationError as error:
        raise UserError(f"{where}: not a warning of a run. Delete the line and try again.") from error


def _line(finding: Finding) -> str:
    return json.dumps(asdict(finding)) + "\n"


def _start_and_now(history: History, metric: str, window: int) -> tuple[float, float] | None:
    """Returns the means of the first and the last `window` values, or None while these windows overlap."""
    values = history.of(metric)
    if values.count < 2 * window:
        return None
    return sum(values.first) / window, sum(values.last) / window


def _entropy_collapse(history: History, settings: DiagnosisSettings) -> str | None:
    means = _start_and_now(history, "entropy/token_mean", settings.window)
    if means is None or means[1] >= settings.entropy_collapse * means[0]:
        return None
    limit = settings.entropy_collapse * means[0]
    return f"entropy {number(means[1])} fell below {number(limit)}, {settings.entropy_collapse:g} of its initial value"


def _entropy_explosion(history: History, settings: DiagnosisSettings) -> str | None:
    means = _start_and_now(history, "entropy/token_mean", settings.window)
    if means is None or means[1] <= settings.entropy_explosion * means[0]:
        return None
    limit = settings.entropy_explosion * means[0]
    return f"entropy {number(means[1])} rose above {number(limit)}, {settings.entropy_explosion:g} x its initial value"


def _zero(part: Watched, history: History, settings: DiagnosisSettings) -> str | None:
    values = history.last(part.metric)
    if not values or any(values):
        return None
    return f"{part.meaning}: {part.metric} has been 0 for {settings.window} steps"


def _kept(part: Watched, history: History, settings: DiagnosisSettings) -> str | None:
    values = history.last(part.metric)
    if not values or min(values) <= settings.kept:
        return None
    return f"{part.meaning} keeps at least {number(min(values))} of the tokens, more than {settings.kept:g}"


def _truncation_growth(history: History, settings: DiagnosisSettings) -> str | None:
    means = _start_and_now(history, "response_length/truncated_fraction", settings.window)
    if means is None or means[1] <= max(settings.truncated, 2 * means[0]):
        return None
    limit = max(settings.truncated, 2 * means[0])
    return f"{number(means[1])} of the responses are truncated, more than {number(limit)}"


def _reward_without_accuracy(history: History, settings: DiagnosisSettings) -> str | None:
    reward = _start_and_now(history, "reward/mean", settings.window)
    drops = [values.best - values.last[-1] for values in history.evaluations() if values.count > 1]
    limit = settings.reward_without_accuracy
    if reward is None or not drops or reward[1] - reward[0] < limit or min(drops) < limit:
        return None
    return (
        f"the training reward rose by {number(reward[1] - reward[0])} while every suite's accuracy fell by "
        f"{number(min(drops))} or more from its best; the threshold is {limit:g}"
    )


def _no_reward(history: History, settings: DiagnosisSettings) -> str | None:
    values = history.last("reward/mean")
    if not values or any(values):
        return None
    return f"no response has had a reward for {settings.window} steps"


def _stale_weights(history: History, settings: DiagnosisSettings) -> str | None:
    values = history.last("rollout/staleness_max")
    if not values or min(values) <= settings.staleness:
        return None
    return f"samples are {min(values):.0f} or more weight versions old, more than {settings.staleness}"


def _gap_growth(history: History, settings: DiagnosisSettings) -> str | None:
    """Checks fresh tokens only: for older tokens the gap also grows with the updates of the policy."""
    means = _start_and_now(history, "logprob/fresh_abs_diff", settings.window)
    if means is None or means[1] <= max(settings.gap, settings.gap_growth * means[0]):
        return None
    limit = max(settings.gap, settings.gap_growth * means[0])
    return f"log-probs of fresh tokens differ by {number(means[1])} nat from the actor's, more than {number(limit)}"


_REMEDIES = {
    _truncation_growth: "Responses reach the token limit: raise rollout.max_response_tokens, or penalise overlong "
    "responses with algorithm.overlong.buffer_tokens",
    _reward_without_accuracy: "The policy may exploit the verifier: read responses in the report, tighten the reward",
    _no_reward: "Read a rollout dump: a wrong data.template, data.label_field or reward.name is more likely than a "
    "weak model",
    _stale_weights: "Rollouts lag behind training: lower rollout.max_staleness or raise rollout.engines",
    _gap_growth: "Importance ratios are wrong by the same amount: check the engine's temperature, log-prob mode and "
    "precision, and that weight updates arrive",
}
"""Remedies that are the same for every method."""


def rules_of(algorithm: AlgorithmSettings) -> list[Rule]:
    """Returns the rules for runs of the configured method. Several rules may have one name."""
    rules = [
        Rule("entropy_collapse", _entropy_collapse, more_entropy(algorithm)),
        Rule("entropy_explosion", _entropy_explosion, less_entropy(algorithm)),
    ]
    rules += [Rule("nothing_selected", partial(_zero, part), part.remedy) for part in selections(algorithm)]
    rules += [Rule("everything_kept", partial(_kept, part), part.remedy) for part in filters(algorithm)]
    rules += [Rule(holds.__name__.removeprefix("_"), holds, remedy) for holds, remedy in _REMEDIES.items()]
    return rules
