"""What is evaluated and how: the `evaluation` section of a run, and the suite files of `megatron-rl eval`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .fields import Count, FilePath, Name, NonNegative, PositiveInt, Section, Text
from .reward import RewardSettings

Template = Literal["none", "chat", "boxed", "chat-boxed", "r1-zero"]


class Probe(Section):
    """A probability to follow: of `token` right after `after`, averaged over a suite's responses."""

    after: Text
    """Text of one token."""
    token: Text
    """Text of one token."""


class SuiteSettings(Section):
    """One suite. Its path alone is enough: the rest is then as for all suites."""

    data: FilePath
    """A .jsonl or .parquet file of problems."""
    samples_per_prompt: PositiveInt | None = None
    """Responses per problem; unset: as for all suites."""
    temperature: NonNegative | None = None
    """Of sampling, 0 is greedy; unset: as for all suites."""
    max_response_tokens: PositiveInt | None = None
    """Longest response; unset: as for all suites."""

    def over(self, common: EvaluationSettings | ProtocolSettings) -> SuiteSettings:
        """With what is unset here as it is for all suites."""
        names = ("samples_per_prompt", "temperature", "max_response_tokens")
        return self.model_copy(update={name: getattr(common, name) for name in names if getattr(self, name) is None})


def _suite(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


Suite = Annotated[SuiteSettings, BeforeValidator(_suite)]
"""In YAML: a path, or a section."""


class EvaluationSettings(Section):
    """Benchmarks before, during and after training."""

    every: Count = 0
    """Steps between evaluations; 0: before and after training only."""
    samples_per_prompt: PositiveInt = 8
    """Responses per prompt: the k of avg@k, pass@k and maj@k."""
    temperature: NonNegative = 1.0
    """Of sampling; 0 is greedy."""
    max_response_tokens: PositiveInt | None = None
    """Longest response; unset: rollout.max_response_tokens."""
    suites: dict[Name, Suite] = Field(default_factory=dict)
    """Data file of each suite, or a section of its own settings; its name appears in the metrics."""
    probes: dict[Name, Probe] = Field(default_factory=dict)
    """Probabilities to follow, by the name they get in the metrics."""


class ProtocolSettings(Section):
    """A suite file: what `megatron-rl eval` measures."""

    template: Template = "none"
    """As data.template."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are cut on the left."""
    max_response_tokens: PositiveInt = 8192
    """Longest response."""
    samples_per_prompt: PositiveInt = 1
    """Responses per problem."""
    temperature: NonNegative = 0.0
    """Of sampling; 0 is greedy."""
    reward: RewardSettings
    """What grades the responses."""
    suites: dict[Name, Suite] = Field(min_length=1)
    """By name. Their unweighted mean is the macro mean."""
