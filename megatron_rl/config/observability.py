"""The `observability` section: what a run shows, records and warns about."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, Name, NonNegative, Positive, PositiveInt, Section, Share, Text

WORD_CLASSES: dict[str, list[str]] = {
    "exploratory": ["but", "wait", "perhaps", "alternatively", "however"],
    "irrelevant": ["cost", "fine", "balanced", "ere", "trans"],
}
"""The two word lists of the Lp-Reg paper (arXiv 2510.03222)."""


class WandbSettings(Section):
    """Weights & Biases (`pip install wandb`). The API key comes from wandb's own environment variables."""

    project: Text
    """Project, created if it does not exist."""
    entity: Text | None = None
    """User or team. Default: the owner of the API key."""
    mode: Literal["online", "offline"] = "online"
    """offline: write files to the run's folder for a later `wandb sync`."""


class MlflowSettings(Section):
    """MLflow (`pip install mlflow` or `mlflow-skinny`)."""

    tracking_uri: Text
    """Server or database, such as http://tracking:5000 or sqlite:///mlflow.db."""
    experiment: Text
    """Experiment, created if it does not exist."""


class TrackioSettings(Section):
    """Trackio (`pip install trackio`), which keeps metrics on this machine."""

    project: Text
    """Project, created if it does not exist."""


class DiagnosisSettings(Section):
    """Thresholds of the warnings. Values are means over the last `window` steps, compared with the first `window`."""

    window: PositiveInt = 10
    """Number of steps that a mean covers."""
    entropy_collapse: Share = 0.1
    """Fraction of its initial value below which the token entropy counts as collapsed."""
    entropy_explosion: Positive = 3.0
    """Multiple of its initial value above which the token entropy counts as exploded."""
    kept: Share = 0.9999
    """Fraction of tokens in the proxy's filter above which the filter counts as ineffective."""
    truncated: Share = 0.2
    """Fraction of truncated responses above which the run warns, if the fraction has also doubled."""
    reward_without_accuracy: Share = 0.05
    """Rise of the training reward, with an equal fall of every suite's accuracy from its best, that suggests reward
    hacking."""
    staleness: Count = 4
    """Largest staleness of samples, in weight versions, without a warning."""
    gap: Positive = 0.01
    """Mean absolute difference of rollout and actor log-probs, in nats, above which the run warns, if the difference
    has also grown."""
    gap_growth: Positive = 5.0
    """Multiple of its initial value above which the difference counts as grown."""


class ObservabilitySettings(Section):
    """What a run shows, records and warns about."""

    view: Literal["auto", "live", "plain", "off"] = "auto"
    """Progress on standard output. auto: the live view on a terminal, plain lines elsewhere."""
    tensorboard: bool = True
    """Write TensorBoard files in addition to metrics.jsonl."""
    wandb: WandbSettings | None = None
    """Send metrics to Weights & Biases."""
    mlflow: MlflowSettings | None = None
    """Send metrics to MLflow."""
    trackio: TrackioSettings | None = None
    """Write metrics for Trackio's dashboard, into TRACKIO_DIR (default: Hugging Face's cache)."""
    rollouts_every: Count = 10
    """Steps between rollout dumps. 0 writes none. A dump is skipped if dumps would take more than 2 % of the run's
    time. With 1, every step has its dump, which a replay needs."""
    profile: list[PositiveInt] = Field(default_factory=list)
    """Steps at which every actor rank writes a torch-profiler trace and tables to `profile` in the run folder."""
    rollouts_tokens: PositiveInt = 2_000_000
    """Most sampled tokens in a dump. For a larger step, some complete groups are recorded. The metric
    perf/record_seconds is the time this takes."""
    hang_seconds: NonNegative = 1800.0
    """Longest time without progress in any process. After it, the run reports which process waits for which, writes the
    stacks of all processes to logs/stacks, and stops. 0: no limit."""
    diagnosis: DiagnosisSettings = DiagnosisSettings()
    """Thresholds of the warnings in warnings.jsonl, on the terminal and in the report."""
    word_classes: dict[Name, Annotated[list[Text], Field(min_length=1)]] = WORD_CLASSES
    """Words per class for the figures of the report. A token belongs to a class if its text, stripped and in lower
    case, is one of the words. The default is the two lists of the Lp-Reg paper."""
