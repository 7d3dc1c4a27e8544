"""The `reward` section: the verifier, its processes, and the treatment of failures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, NameOrPath, Positive, PositiveInt, Section, ShareOrZero, Text

VERIFIERS = {
    "countdown": "megatron_rl.reward.countdown:verify_countdown",
    "math": "megatron_rl.reward.maths:MathsReward",
    "code": "megatron_rl.reward.code:CodeReward",
    "agent": "megatron_rl.reward.agent:no_reward",
    "reasoning-gym": "megatron_rl.environments.reasoning_gym:ReasoningGymReward",
}
"""Name -> import path of each built-in verifier."""
REMOTE = "remote"
"""Name of a reward that a server computes."""


class CodeSettings(Section):
    """Limits of a candidate program in its sandbox. Used by `reward.name: code` only."""

    test_seconds: Positive = 4.0
    """Longest processor time and wall-clock time of one test. A slower program counts as wrong."""
    memory_mb: PositiveInt = 512
    """Address space of the candidate's process in MiB."""
    require_landlock: bool = True
    """Refuse to start if the kernel cannot keep the candidate away from other files (Linux before 5.13, or Landlock
    disabled). false: run the candidate anyway, with read and write access to every file that the user can access."""


class MathSettings(Section):
    """Verdicts of `reward.name: math`."""

    grader: Literal["standard", "published"] = "standard"
    """standard: compares the parts of an answer as mathematics. published: grades as the paper's code did, which also
    accepts wrong answers and refuses right ones; for comparing absolute scores with the paper only."""


class RemoteSettings(Section):
    """A reward server behind HTTP. Used by `reward.name: remote` only. docs/rewards.md describes the protocol."""

    url: Text
    """Address to which batches are posted."""
    batch_size: PositiveInt = 16
    """Samples per request."""
    concurrency: PositiveInt = 8
    """Requests in flight at the same time."""
    timeout_seconds: Positive = 60.0
    """Longest duration of one request."""
    retries: Count = 4
    """Further attempts after a time-out, a lost connection, or a status 408, 429 or 5xx."""
    backoff_seconds: Positive = 0.5
    """Wait before the first further attempt. The wait doubles with each attempt, with jitter."""
    token_variable: Text | None = None
    """Environment variable that holds a bearer token for the server."""


class FormatSettings(Section):
    """Tags that a response must contain, and the penalty if they are missing."""

    tags: list[Text] = Field(min_length=1)
    """Texts that must each appear exactly once in the response, in this order, such as <think> and </think>."""
    penalty: Positive = 0.5
    """Amount subtracted from the reward of a response that does not have the tags in this form."""


class RewardSettings(Section):
    """The verifier and its processes."""

    name: Annotated[str, NameOrPath((*VERIFIERS, REMOTE), "package.module:function")]
    """countdown, math, code, remote, agent, reasoning-gym, or a function of your own as `package.module:function`.
    agent: the agent of `rollout.agent` gives the reward. reasoning-gym: the task's own scorer does."""
    workers: PositiveInt = 2
    """Number of verifier processes. remote uses none."""
    timeout_seconds: Positive = 5.0
    """Longest grading time per sample. After it, the process is killed, and the sample has no reward."""
    memory_mb: PositiveInt = 4096
    """Memory limit per process in MiB. A process that exceeds it is replaced, and the sample has no reward."""
    max_failed_fraction: ShareOrZero = 0.2
    """Largest fraction of a batch that may end without a score (time-out or error). Such samples are left out of
    baselines and of the loss. Above the limit, the run stops and shows examples."""
    math: MathSettings = MathSettings()
    code: CodeSettings = CodeSettings()
    remote: RemoteSettings | None = None
    format: FormatSettings | None = None
