"""Settings of evaluation: the `evaluation` section of a run, and the suite files of `megatron-rl eval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .agent import AgentSettings
from .fields import Count, FilePath, Name, NonNegative, PositiveInt, Section, Text
from .reward import RewardSettings

Template = Literal["none", "chat", "boxed", "chat-boxed", "r1-zero", "zero"]

MACRO_MEAN = "eval/macro_mean/avg"
"""Metric of the unweighted mean over the suites, if there are several."""


class Probe(Section):
    """A tracked probability: that `token` comes right after `after`, averaged over the responses of a suite."""

    after: Text
    """Text of the preceding token. It must be exactly one token."""
    token: Text
    """Text of the token whose probability is measured. It must be exactly one token."""


class TaskSettings(Section):
    """Which problems an environment makes. Used for data named `reasoning-gym:...`, `verifiers:...` or `harbor:...`
    only; docs/environments.md has the details."""

    size: PositiveInt = 1000
    """Number of problems; in a suite, 100 if it is not set. An environment of verifiers or Harbor that has fewer gives
    all of them, a task of reasoning-gym is refused then."""
    seed: Count = 0
    """Seed of the choice of problems. The same seed makes the same problems."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The environment's own settings, such as those of a reasoning-gym task, by the names that its library gives
    them."""


class SuiteSettings(Section):
    """One suite. A path alone is enough: the other keys then have the values of the surrounding section."""

    data: FilePath
    """A .jsonl or .parquet file of problems, a data set of the Hugging Face Hub, or the tasks of an environment, as for
    data.train."""
    tasks: TaskSettings | None = None
    """Which problems an environment makes, if `data` names one. Default: 100 problems. A run whose training has one of
    them does not start."""
    samples_per_prompt: PositiveInt | None = None
    """Responses per problem. Default: the value of the surrounding section."""
    temperature: NonNegative | None = None
    """Sampling temperature; 0 is greedy. Default: the value of the surrounding section."""
    max_response_tokens: PositiveInt | None = None
    """Longest response in tokens. Default: the value of the surrounding section."""

    def over(self, common: EvaluationSettings | ProtocolSettings) -> SuiteSettings:
        """Returns a copy of this suite with unset keys filled in from the surrounding section."""
        names = ("samples_per_prompt", "temperature", "max_response_tokens")
        return self.model_copy(update={name: getattr(common, name) for name in names if getattr(self, name) is None})


def _suite(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


Suite = Annotated[SuiteSettings, BeforeValidator(_suite)]
"""A suite in YAML: a path or a section."""


class EvaluationSettings(Section):
    """Benchmarks before, during and after training."""

    every: Count = 0
    """Steps between evaluations. 0 evaluates before and after training only."""
    samples_per_prompt: PositiveInt = 8
    """Responses per prompt: the k in avg@k, pass@k and maj@k."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    max_response_tokens: PositiveInt | None = None
    """Longest response in tokens. Default: rollout.max_response_tokens."""
    suites: dict[Name, Suite] = Field(default_factory=dict)
    """Suites by the name that appears in the metrics. Each is a data file or a section with settings of its own."""
    probes: dict[Name, Probe] = Field(default_factory=dict)
    """Tracked probabilities by the name that appears in the metrics."""


class ProtocolSettings(Section):
    """A suite file: the evaluation that `megatron-rl eval` runs."""

    template: Template = "none"
    """Prompt template; the values are those of data.template."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens. Longer prompts are cut on the left."""
    max_response_tokens: PositiveInt = 8192
    """Longest response in tokens."""
    samples_per_prompt: PositiveInt = 1
    """Responses per problem."""
    temperature: NonNegative = 0.0
    """Sampling temperature; 0 is greedy."""
    reward: RewardSettings
    """Verifier that grades the responses."""
    agent: AgentSettings | None = None
    """The agent that samples the responses; the keys are those of rollout.agent. Default: the model answers in one
    turn."""
    suites: dict[Name, Suite] = Field(min_length=1)
    """Suites by name. The macro mean is the unweighted mean over the suites."""
