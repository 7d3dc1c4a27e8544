"""The verifier, the processes it runs in, and what happens when it fails."""

from __future__ import annotations

from pydantic import Field

from .fields import Count, Positive, PositiveInt, Section, ShareOrZero, Text


class CodeSettings(Section):
    """Limits of a candidate program in its sandbox; `reward.name: code` only."""

    test_seconds: Positive = 4.0
    """Longest one test may take, in processor time and on the clock; beyond it the answer is wrong (too slow)."""
    memory_mb: PositiveInt = 512
    """Address space of the candidate's process."""
    require_landlock: bool = True
    """Refuse to start where the kernel cannot keep the candidate away from other files (Linux before 5.13, or Landlock
    disabled). false: run it there all the same, able to read and write what you may."""


class RemoteSettings(Section):
    """A reward model behind HTTP; `reward.name: remote` only. The protocol is in docs/rewards.md."""

    url: Text
    """Where batches are posted to."""
    batch_size: PositiveInt = 16
    """Samples a request."""
    concurrency: PositiveInt = 8
    """Requests under way at once."""
    timeout_seconds: Positive = 60.0
    """Longest one request may take."""
    retries: Count = 4
    """Further attempts after a time-out, a lost connection, or a status 408, 429 or 5xx."""
    backoff_seconds: Positive = 0.5
    """Wait before the first further attempt; doubled each time, with jitter."""
    token_variable: Text | None = None
    """Environment variable with a bearer token for the server."""


class FormatSettings(Section):
    """Marks that a response must carry, and what it costs to lack them."""

    tags: list[Text] = Field(min_length=1)
    """Texts that must each appear exactly once in the response, in this order, such as <think> and </think>."""
    penalty: Positive = 0.5
    """Subtracted from the reward of a response that breaks the rule."""


class RewardSettings(Section):
    """The verifier and the processes it runs in."""

    name: Text
    """countdown, math, code, remote, or a function of your own as `package.module:function`."""
    workers: PositiveInt = 2
    """Processes; remote has none."""
    timeout_seconds: Positive = 5.0
    """Longest grading one sample may take; beyond it its process is killed, the outcome is a time-out, the score 0."""
    memory_mb: PositiveInt = 4096
    """Memory of a process; beyond it, it is replaced, and the sample's outcome is an error."""
    max_failed_fraction: ShareOrZero = 0.2
    """Largest share of a batch that may end without a score (time-out or error); beyond it the run stops with
    examples, because such samples count as 0."""
    code: CodeSettings = CodeSettings()
    remote: RemoteSettings | None = None
    format: FormatSettings | None = None
