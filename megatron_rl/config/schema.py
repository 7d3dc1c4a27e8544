"""Every key of a configuration file. The text under a field is its documentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from .actor import ActorSettings
from .algorithm import AlgorithmSettings
from .cluster import ClusterSettings
from .evaluation import EvaluationSettings, Template
from .fields import Betas, Count, FilePath, NonNegative, Positive, PositiveInt, Section, ShareOrZero, Text
from .observability import ObservabilitySettings
from .reward import RewardSettings
from .rollout import RolloutSettings
from .weight_sync import WeightSyncSettings


class RunSettings(Section):
    """Name and place of the run. `load_config` fills both in where the file leaves them out."""

    name: Text
    """Unset: `<stem of the YAML file>-<YYYYmmdd-HHMMSS>`."""
    folder: FilePath
    """Everything the run writes goes here. Unset: `runs/<name>`."""


class PrepareSettings(Section):
    """An embedded task, written before training unless it is already there."""

    task: Literal["countdown"]
    """Which task."""
    folder: FilePath
    """Where its model and data go."""


class ModelSettings(Section):
    """The policy to train."""

    path: FilePath
    """A Hugging Face folder: config.json, tokenizer, weights."""


class DataSettings(Section):
    """Training prompts. `template` to `label_field` hold for the evaluation suites too."""

    train: FilePath
    """A .jsonl or .parquet file; slime's, verl's and TRL's columns are recognised."""
    template: Template = "none"
    r"""none: the prompt as it is (messages joined by newlines). chat: the tokenizer's chat template. boxed: the prompt
    and a request to reason step by step and to end with \boxed{}; chat-boxed: the same in the chat template. r1-zero:
    the conversation of DeepSeek-R1-Zero, thoughts and answer in tags."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt, in tokens, after the template."""
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """What happens to a longer one."""
    drop_duplicates: bool = False
    """Keep only the first row of those with the same prompt and label; DAPO-Math-17k as shipped repeats its rows."""
    shuffle: bool = True
    """A new order each epoch, from the seed."""
    label_field: Text | None = None
    """Column that holds the ground truth; unset: as the recognised schema has it."""


class WarmStartPhase(Section):
    """One stretch of supervised training."""

    data: FilePath
    """A .parquet file with the text columns prompt and response; the loss is on the response."""
    steps: PositiveInt
    """Optimizer steps."""
    lr: Positive
    """Peak learning rate of a cosine."""


class WarmStartSettings(Section):
    """Supervised training before RL, through the same actor. Its result is cached by content."""

    cache_folder: FilePath = Field(default="runs/cache", validate_default=True)
    """Where results are kept between runs."""
    batch_size: PositiveInt
    """Rows a step."""
    phases: list[WarmStartPhase] = Field(min_length=1)
    """One after another, each with its own schedule."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    warmup_steps: Count = 0
    """Steps of linear warm-up, in every phase."""
    min_lr_ratio: ShareOrZero = 0.0
    """Learning rate at a phase's last step, as a share of its lr."""


class KeepBestSettings(Section):
    """Checkpoints to keep whatever else is removed: those of the steps with the best evaluation."""

    metric: Text
    """Such as eval/aime/avg@8; a step without it is not compared."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less is better."""
    count: PositiveInt = 1
    """How many."""


class TrainSettings(Section):
    """Length of training, checkpoints, and what a step updates on."""

    steps: PositiveInt
    """RL steps: in each, responses are sampled, then trained on."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates on a step's rollouts, at the step's learning rate. 1 is on-policy. With more, every pass over
    the rollouts is cut into equal mini-batches of whole prompts, and one forward without gradients before the first
    update fixes what the loss needs of the old policy."""
    epochs_per_rollout: PositiveInt = 1
    """Passes over a step's rollouts, which updates_per_rollout is shared out to; each later one in a new order."""
    save_every: Count = 0
    """Steps between checkpoints; 0: one at the end only."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_best: KeepBestSettings | None = None
    """The best ones are kept besides."""
    async_save: bool = True
    """Train on while a checkpoint is written from a copy in CPU memory; false: write it file by file and wait."""
    rollout_only: bool = False
    """Sample, grade and record, but train nothing."""
    drop_zero_advantage: bool = True
    """Leave responses without an advantage out of the update where the loss has no gradient there; it is still
    normalised over all tokens."""
    score_dropped: bool = True
    """Still run those responses forward, so that entropy and the other metrics cover the whole batch."""


class Sources(dict[str, str]):
    """The source of each value that is not a default, by its dotted key. It equals any other, so that configurations
    are compared by their values alone."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

    def __ne__(self, other: object) -> bool:
        return not self == other


class Config(Section):
    """One run."""

    _sources: Sources = PrivateAttr(default_factory=Sources)

    run: RunSettings
    seed: Count = 0
    """Of sampling, shuffling and initialisation."""
    resume: Annotated[Literal["never", "auto"] | FilePath, Field(union_mode="left_to_right")] = "never"
    """auto: go on from the run folder's newest checkpoint, if any; or the path of a checkpoint or of a run's folder."""
    prepare: PrepareSettings | None = None
    model: ModelSettings
    data: DataSettings
    warm_start: WarmStartSettings | None = None
    rollout: RolloutSettings
    weight_sync: WeightSyncSettings = WeightSyncSettings()
    reward: RewardSettings
    algorithm: AlgorithmSettings = AlgorithmSettings()
    actor: ActorSettings = ActorSettings()
    cluster: ClusterSettings = ClusterSettings()
    train: TrainSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @property
    def sources(self) -> Sources:
        """Where values were set, as far as `load_config` knows; see `effective`."""
        return self._sources

    @property
    def keeps_rollouts(self) -> bool:
        """Whether what a step did not finish or need goes on at the next one."""
        return self.rollout.max_staleness > 0

    @property
    def versions_late(self) -> int:
        """How many weight versions old a token may be when a step begins to train on it."""
        return self.rollout.max_staleness * self.train.updates_per_rollout
