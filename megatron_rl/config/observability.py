"""The `observability` section: what a run shows, records and warns of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, Name, NonNegative, Positive, PositiveInt, Section, Share, Text

WORD_CLASSES: dict[str, list[str]] = {
    "exploratory": ["but", "wait", "perhaps", "alternatively", "however"],
    "irrelevant": ["cost", "fine", "balanced", "ere", "trans"],
}
"""The paper's two lists (arXiv 2510.03222)."""


class WandbSettings(Section):
    """Weights & Biases; `pip install wandb`. Its own environment variables hold the key."""

    project: Text
    """Made when it does not exist."""
    entity: Text | None = None
    """User or team; unset: the key's own."""
    mode: Literal["online", "offline"] = "online"
    """offline: files in the run's folder, for `wandb sync` later."""


class MlflowSettings(Section):
    """MLflow; `pip install mlflow`, or mlflow-skinny."""

    tracking_uri: Text
    """Server or database, such as http://tracking:5000 or sqlite:///mlflow.db."""
    experiment: Text
    """Made when it does not exist."""


class DiagnosisSettings(Section):
    """When a run warns. Means are over `window` steps, starts over the first `window` steps."""

    window: PositiveInt = 10
    """Steps."""
    entropy_collapse: Share = 0.1
    """Share of its start below which the token entropy has collapsed."""
    entropy_explosion: Positive = 3.0
    """Multiple of its start above which it has exploded."""
    kept: Share = 0.9999
    """Share of tokens above which the proxy keeps everything."""
    truncated: Share = 0.2
    """Share of truncated responses that is too large, if it has also doubled."""
    reward_without_accuracy: Share = 0.05
    """Rise of the training reward, and fall of every suite's accuracy from its best, that look like cheating."""
    staleness: Count = 4
    """Weight versions that samples may be old."""
    gap: Positive = 0.01
    """Mean difference of rollout and actor log-probs, in nats, that is too large, if it has also grown."""
    gap_growth: Positive = 5.0
    """Multiple of its start that counts as grown."""


class ObservabilitySettings(Section):
    """What a run shows and records."""

    view: Literal["auto", "live", "plain", "off"] = "auto"
    """On the terminal; auto: live on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb: WandbSettings | None = None
    """Send metrics to Weights & Biases."""
    mlflow: MlflowSettings | None = None
    """Send metrics to MLflow."""
    rollouts_every: Count = 10
    """Steps between dumps of a step's rollouts; 0: none. One that would make dumps cost more than 2 % of the run's time
    is left out, but with 1 every step has its dump, which a replay needs."""
    profile: list[PositiveInt] = Field(default_factory=list)
    """Steps at which every actor rank writes a torch-profiler trace and tables to the run folder's `profile`."""
    rollouts_tokens: PositiveInt = 2_000_000
    """Most response tokens in a dump; of a larger step some whole groups are recorded. perf/record_seconds is the
    cost."""
    hang_seconds: NonNegative = 1800.0
    """Longest time without progress in any process; then the run says who waits for whom, writes the stacks of all
    processes to logs/stacks, and stops. 0: wait for ever."""
    diagnosis: DiagnosisSettings = DiagnosisSettings()
    """Thresholds of the warnings in warnings.jsonl, on the terminal and in the report."""
    word_classes: dict[Name, Annotated[list[Text], Field(min_length=1)]] = WORD_CLASSES
    """Words that the report's figures follow, by class; a token belongs to a class when its text, without blanks and in
    lower case, is one of its words. The default is the paper's."""
