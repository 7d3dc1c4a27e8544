"""A run in progress: its components and its progress. `run/opening.py` opens one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.actor.optimizer.learning_rate import learning_rate
from megatron_rl.agent.rollouts import AgentRollouts
from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.checkpoint.manifest import DriverState
from megatron_rl.checkpoint.save import Saver
from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.weight_sync import WeightSync
from megatron_rl.config import Config
from megatron_rl.data.cursor import Cursor
from megatron_rl.data.prompts import PromptSet
from megatron_rl.observability.diagnosis import Diagnosis
from megatron_rl.observability.metrics import MetricsLog
from megatron_rl.observability.provenance import Provenance
from megatron_rl.observability.timing import Phases
from megatron_rl.observability.view import View
from megatron_rl.reward.grading import Grading
from megatron_rl.rollout.buffer import Group
from megatron_rl.rollout.contract import Contract
from megatron_rl.rollout.rollouts import RolloutSource
from megatron_rl.run.recorder import Recorder
from megatron_rl.run.sampling import step_sampling
from megatron_rl.training.learner import Learner
from megatron_rl.training.metrics import rate_metrics
from megatron_rl.types import Prompt
from megatron_rl.utils.heartbeat import FOLDER as HEARTBEATS
from megatron_rl.utils.heartbeat import memory_metrics, read_beats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that a run reads, loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    suites: dict[str, list[Prompt]]
    probes: dict[str, tuple[int, int]]
    """Name -> (preceding token, token whose probability is measured after it)."""
    stop_token_ids: tuple[int, ...]


@dataclass
class Run:
    """The components that a step needs, and the number of steps done."""

    config: Config
    folder: Path
    inputs: Inputs
    cursor: Cursor
    rollouts: RolloutSource
    grading: Grading
    learner: Learner
    engines: Engines | None
    """None if the run replays rollouts."""
    sampler: Engines | AgentRollouts | None
    """What samples responses: the engines, or an agent that uses them."""
    weights: WeightSync | None
    """None without engines."""
    contract: Contract
    saver: Saver
    recorder: Recorder
    view: View
    metrics: MetricsLog
    diagnosis: Diagnosis
    phase: Phases
    provenance: Provenance
    step: int = 0
    """Number of steps done."""
    last_step: tuple[DriverState, dict[str, float], list[Group]] | None = None
    """Arguments for a checkpoint of the last step that this process did."""
    step_flops: float = 0.0
    """Operations of the last step's own scoring and training."""
    resumed: bool = False

    @property
    def actors(self) -> Actors:
        return self.learner.actors

    @property
    def keeps_weights(self) -> bool:
        """Whether the run writes checkpoints and an export. A run that only studies rollouts or a loss does not."""
        return self.config.rollout.replay is None and not self.config.train.rollout_only

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: only at the end) happens after this step."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def seed(self, step: int) -> int:
        """Seed of a step's random numbers in the driver."""
        return step_sampling(self.config, self.inputs.stop_token_ids, step).seed

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        settings = self.config.actor.optimizer
        return learning_rate(
            step,
            peak=settings.lr,
            total_steps=self.config.train.steps,
            warmup_steps=settings.warmup_steps,
            schedule=settings.schedule,
            min_ratio=settings.min_lr_ratio,
        )

    def release_engines(self) -> None:
        """Makes engines on the actor's GPUs free their memory for training; `sync_weights` brings them back."""
        if self.weights and self.config.cluster.colocate and self.config.actor.device != "cpu":
            self.weights.release_memory()

    def sync_weights(self) -> dict[str, float]:
        """Sends the actor's weights to the engines, and returns metrics. Does nothing if the engines have them already.

        The checksums of all tensors are compared on both sides at the first sync, and then every
        `weight_sync.verify_every` versions. Raises UserError if the engines' log-probs then differ from the actor's.
        """
        if self.weights is None:
            return {}
        before, every, version = self.weights.version, self.config.weight_sync.verify_every, self.learner.weight_version
        if before == version and not self.weights.released:
            return {}  # the step had no update
        verify = before is None or (every > 0 and version % every == 0)
        metrics = self.weights.sync(version, verify=verify)
        return metrics | self.contract.check(self.weights.engines, self._log_probs)

    def _log_probs(self, batch: SequenceBatch, temperature: float) -> Array:
        """Returns the actor's log-probs [T] of the sampled tokens."""
        return self.actors.score(batch, temperature=temperature)["log_probs"]

    def log(self, metrics: dict[str, float]) -> None:
        """Writes a step's metrics to file and screen, then raises the error of a failed background checkpoint."""
        if self.step:  # the row before the first step holds evaluations only
            metrics |= memory_metrics(read_beats(self.folder / "logs" / HEARTBEATS))
        self.metrics.write(self.step, metrics | self.phase.flush() | self.saver.poll())
        if self.step:
            self.view.step(self.step, metrics)
            self.recorder.cost.step(metrics["perf/step_seconds"], metrics.get("perf/record_seconds", 0.0))
        for finding in self.diagnosis.step(self.step, metrics):
            self.view.message(str(finding))

    def rates(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns metrics of the actor's operations per second. metrics: with the seconds of scoring and training."""
        seconds = metrics.get("perf/score_seconds", 0.0) + metrics.get("perf/train_seconds", 0.0)
        gpu = self.actors.gpu if self.config.actor.dtype != "float32" else None  # the known rate is that of bf16
        return rate_metrics(self.step_flops, seconds, len(self.actors.ranks), gpu.flops if gpu else None)

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Counts the operations of the actor's work in the block, and traces it at the steps that the configuration
        names."""
        before = self.actors.flops
        with self._traced(step):
            yield
        self.step_flops = self.actors.flops - before

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        if step not in self.config.observability.profile:
            yield
            return
        folder = self.folder / "profile" / f"step_{step:06d}"
        self.actors.start_profile()
        try:
            yield
        finally:
            self.actors.stop_profile(folder)
        self.view.message(f"profile: {folder}")

    def step_done(self, metrics: dict[str, float]) -> None:
        """Counts the step that has these metrics, and keeps the state to resume from, before the next step draws
        prompts."""
        self.step += 1
        self.last_step = self._state(), metrics, self.rollouts.pending

    def save(self, metrics: dict[str, float], *, background: bool) -> None:
        """Writes a checkpoint of the last step, which has these metrics."""
        if not self.keeps_weights:
            return
        with self.phase("checkpoint"):
            background = background and self.config.train.async_save
            self.saver.save(self._state(), metrics, self.rollouts.pending, background=background)

    def _state(self) -> DriverState:
        learner = self.learner
        return DriverState(
            self.step,
            learner.weight_version,
            self.cursor.state(),
            learner.entropy_coefficient,
            self.metrics.written,
        )
