"""Every key of a configuration file. The docstring under a field documents its key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PrivateAttr

from megatron_rl.rollout.engines.kind import engine_kind

from .actor import ActorSettings
from .algorithm import AlgorithmSettings
from .cluster import ClusterSettings
from .evaluation import EvaluationSettings, TaskSettings, Template
from .fields import Betas, Count, FilePath, NonNegative, Positive, PositiveInt, Section, ShareOrZero, Text
from .observability import ObservabilitySettings
from .reward import RewardSettings
from .rollout import RolloutSettings
from .weight_sync import WeightSyncSettings


class RunSettings(Section):
    """Name and folder of the run. `load_config` fills in what the file leaves out."""

    name: Text
    """Name of the run. Default: `<stem of the YAML file>-<method>-<YYYYmmdd-HHMMSS>`."""
    folder: FilePath
    """Folder that everything the run writes goes to. Default: `runs/<name>`."""


class PrepareSettings(Section):
    """An embedded task. The run writes its files before training unless they already exist."""

    task: Literal["countdown", "countdown_calculator"]
    """Name of the task."""
    folder: FilePath
    """Folder for the task's model and data."""


class ModelSettings(Section):
    """The policy to train."""

    path: FilePath
    """Hugging Face model folder with config.json, tokenizer and weights; or a model of the Hugging Face Hub,
    `owner/name` or `owner/name@revision`."""
    max_positions: PositiveInt | None = None
    """Longest prompt and response together, in tokens. Unset: what the model is made for, by config.json, rope scaling
    included. A larger number runs the model on positions that it was not made for."""


class DataSettings(Section):
    """Training prompts. The keys from `template` to `label_field` also apply to the evaluation suites."""

    train: FilePath
    """A .jsonl or .parquet file with the columns of slime, verl or TRL; a data set of the Hugging Face Hub,
    `owner/name`, `owner/name:split` or `owner/name:subset:split`; or the tasks of an environment, `reasoning-gym:TASK`,
    `verifiers:ENVIRONMENT` or `harbor:FOLDER`."""
    template: Template = "none"
    r"""none: the prompt unchanged, with messages joined by newlines. chat: the tokenizer's chat template. boxed: the
    prompt followed by a request to reason step by step and to put the answer in \boxed{}. chat-boxed: the boxed prompt
    in the chat template. r1-zero: the conversation of DeepSeek-R1-Zero, with reasoning and answer in tags. zero: the
    boxed prompt in a conversation that ends in <think>, as in the scripts of the Lp-Reg paper."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt in tokens, after the template is applied."""
    long_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """Treatment of longer prompts: drop them, cut them on the left, or stop with an error."""
    drop_duplicates: bool = False
    """Keep only the first row among rows with the same prompt and label. DAPO-Math-17k as published repeats rows."""
    shuffle: bool = True
    """Use a new order of the rows in each epoch, derived from the seed."""
    label_field: Text | None = None
    """Column that holds the ground truth. Default: the column of the recognised schema."""
    allow_changed: bool = False
    """Resume even if `train` is another file than in the checkpoint, by its SHA-256. The run then begins with the first
    prompt of the new file, and drops prompts of the old one that it had drawn and not trained on."""
    tasks: TaskSettings | None = None
    """Which problems an environment makes, if `train` names one. Default: 1,000 problems."""


class WarmStartPhase(Section):
    """One phase of supervised training."""

    data: FilePath
    """A .parquet file with the text columns prompt and response. The loss covers the response tokens."""
    steps: PositiveInt
    """Optimizer steps."""
    lr: Positive
    """Peak learning rate of the cosine schedule."""


class WarmStartSettings(Section):
    """Supervised training before RL, with the same actor. The result is cached by the content of its inputs."""

    cache_folder: FilePath = Field(default="runs/cache", validate_default=True)
    """Folder that keeps results between runs."""
    batch_size: PositiveInt
    """Rows per optimizer step."""
    phases: list[WarmStartPhase] = Field(min_length=1)
    """Phases in order, each with its own learning-rate schedule."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    warmup_steps: Count = 0
    """Steps of linear warm-up at the start of every phase."""
    min_lr_ratio: ShareOrZero = 0.0
    """Learning rate at the last step of a phase, as a fraction of the phase's lr."""


class KeepBestSettings(Section):
    """Retention of the checkpoints with the best evaluation, regardless of `keep_checkpoints`."""

    metric: Text
    """Evaluation metric, such as eval/aime/avg@8, or eval/macro_mean/avg, the mean over all suites. Steps without this
    metric are not compared."""
    mode: Literal["max", "min"] = "max"
    """Whether higher or lower values are better."""
    count: PositiveInt = 1
    """Number of checkpoints to keep."""


class TrainSettings(Section):
    """Length of training, updates per step, and checkpoints."""

    steps: PositiveInt
    """Number of RL steps. Each step samples responses and trains on them."""
    updates_per_rollout: PositiveInt = 1
    """Optimizer updates on the rollouts of a step, all at the step's learning rate. The value 1 is on-policy. With more
    updates, every pass over the rollouts is split into equal mini-batches of complete prompt groups, and a forward pass
    without gradients before the first update computes what the loss needs from the old policy."""
    epochs_per_rollout: PositiveInt = 1
    """Passes over the rollouts of a step. updates_per_rollout is divided equally among them, and each later pass uses a
    new order."""
    save_every: Count = 0
    """Steps between checkpoints. 0 writes one checkpoint at the end only."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep. 0 keeps all."""
    keep_best: KeepBestSettings | None = None
    """Additional checkpoints to keep: those with the best evaluation."""
    async_save: bool = True
    """Continue training while a checkpoint is written from a copy in CPU memory. false: write the files one by one and
    wait for them."""
    rollout_only: bool = False
    """Sample, grade and record responses without training on them."""
    drop_zero_advantage: bool = True
    """Leave responses with zero advantage out of the update if the loss has no gradient for them. The loss is still
    normalised over all tokens."""
    score_dropped: bool = True
    """Run the dropped responses through a forward pass, so that entropy and the other metrics cover the whole batch."""


class Sources(dict[str, str]):
    """The source of each value that is not a default, by its dotted key. It equals any other, so that configurations
    are compared by their values alone."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

    def __ne__(self, other: object) -> bool:
        return not self == other


class Config(Section):
    """The configuration of one run."""

    _sources: Sources = PrivateAttr(default_factory=Sources)

    run: RunSettings
    seed: Count = 0
    """Seed of sampling, shuffling and initialisation."""
    resume: Annotated[Literal["never", "auto"] | FilePath, Field(union_mode="left_to_right")] = "never"
    """auto: continue from the newest checkpoint in the run folder, if there is one. A path: continue from that
    checkpoint, or from the newest checkpoint of that run folder."""
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
        """Whether rollouts that a step did not finish or use are kept for the next step."""
        return self.rollout.max_staleness > 0

    @property
    def keeps_requests(self) -> bool:
        """Whether servers are to keep requests across weight updates, with the KV cache that older weights computed. A
        router does not know which requests its servers keep."""
        rollout = self.rollout
        wanted = rollout.asynchronous and not rollout.recompute_kv_cache and rollout.server.router is None
        return wanted and getattr(engine_kind(rollout.engine), "keeps_requests", False)

    @property
    def versions_late(self) -> int:
        """Largest staleness, in weight versions, of a token at the start of the step that trains on it."""
        return self.rollout.max_staleness * self.train.updates_per_rollout
