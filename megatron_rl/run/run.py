"""A run: its rooms, and how far it is. `session/opening.py` opens one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lpreg
from megatron_rl.actor.optimizer.learning_rate import learning_rate
from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.checkpoint.manifest import DriverState
from megatron_rl.checkpoint.save import Saver
from megatron_rl.cluster.actors import Actors
from megatron_rl.cluster.engines import Engines
from megatron_rl.cluster.weight_sync import WeightSync
from megatron_rl.config import Config
from megatron_rl.config.evaluation import SuiteSettings
from megatron_rl.data.cursor import Cursor
from megatron_rl.data.prompts import PromptSet
from megatron_rl.observability.diagnosis import Diagnosis
from megatron_rl.observability.metrics import MetricsLog
from megatron_rl.observability.record import CANDIDATES, Cost, candidate_positions, record, write_candidates
from megatron_rl.observability.step_metrics import rate_metrics
from megatron_rl.observability.timing import Phases
from megatron_rl.observability.view import View
from megatron_rl.reward.grader import Grader
from megatron_rl.reward.outcomes import check_failures, outcome_rates
from megatron_rl.reward.shaping import format_penalties
from megatron_rl.rollout.buffer import RolloutBuffer
from megatron_rl.rollout.contract import Contract
from megatron_rl.rollout.replay import NoEngines, Replay
from megatron_rl.types import Prompt, Sample, SamplingParams
from megatron_rl.utils.heartbeat import FOLDER as HEARTBEATS
from megatron_rl.utils.heartbeat import memory_metrics, read_beats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVALUATION_STREAM = 2**31 - 1
"""Evaluations draw from a stream of random numbers of their own, the same at every step."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads, loaded and checked."""

    tokenizer: PreTrainedTokenizerBase
    train: PromptSet
    suites: dict[str, list[Prompt]]
    probes: dict[str, tuple[int, int]]
    """Name -> (token before, token whose probability is followed)."""
    stop_token_ids: tuple[int, ...]


@dataclass
class Run:
    """Everything a step needs, and how far the run is."""

    config: Config
    folder: Path
    inputs: Inputs
    cursor: Cursor
    loss: lpreg.PolicyLoss
    rewards: Grader
    actors: Actors
    engines: Engines | NoEngines
    replay: Replay | None
    weights: WeightSync | None
    """None where there are no engines."""
    contract: Contract
    saver: Saver
    view: View
    metrics: MetricsLog
    diagnosis: Diagnosis
    phase: Phases
    step: int = 0
    """Steps done."""
    last_step: tuple[DriverState, dict[str, float]] | None = None
    """What a checkpoint of the last one that was done here says, and its metrics."""
    resumed: bool = False
    weight_version: int = 0
    recording_cost: Cost = field(default_factory=Cost)
    buffer: RolloutBuffer = field(default_factory=RolloutBuffer)
    """What earlier steps have left to sample or to train on."""

    @property
    def temperature(self) -> float:
        return self.config.rollout.temperature

    @property
    def keeps_weights(self) -> bool:
        """Whether checkpoints and an export are wanted: not of a run that looks into rollouts or a loss."""
        return self.replay is None and not self.config.train.rollout_only

    @property
    def off_policy(self) -> bool:
        """Whether an update may train a policy other than the one that sampled."""
        return self.config.train.updates_per_rollout > 1 or self.config.keeps_rollouts

    @property
    def ranks_by_actor(self) -> bool:
        """Whether tokens are ranked by what the actor says of them before the first update, not by what the engine
        did."""
        rule, source = self.loss.selection, self.config.algorithm.selection_log_probs
        if rule is None:
            return False
        return rule.needs_entropy or source == "actor" or (source == "auto" and self.off_policy)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: at the end only) happens after this one."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def sampling(self, step: int, draw: int = 0) -> SamplingParams:
        """Depends on seed, step and draw alone, so that a resumed run draws what the uninterrupted one would have."""
        rollout = self.config.rollout
        sampling = SamplingParams(
            n=rollout.samples_per_prompt,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            stop_token_ids=self.inputs.stop_token_ids,
            seed=self.config.seed,
        ).reseeded(step)
        return sampling.reseeded(draw) if draw else sampling

    def evaluation_sampling(self, suite: SuiteSettings | None = None) -> SamplingParams:
        """As the suite says, else as it is for all."""
        settings = self.config.evaluation
        own = suite.over(settings) if suite else settings
        return SamplingParams(
            n=own.samples_per_prompt or settings.samples_per_prompt,
            max_tokens=own.max_response_tokens or self.config.rollout.max_response_tokens,
            temperature=settings.temperature if own.temperature is None else own.temperature,
            stop_token_ids=self.inputs.stop_token_ids,
            seed=self.config.seed,
        ).reseeded(EVALUATION_STREAM)

    def grade(self, samples: list[Sample]) -> None:
        """Fill in what the verifier says."""
        for sample, result in zip(samples, self.rewards.score(samples), strict=True):
            sample.reward = result

    def check_grades(self, samples: list[Sample]) -> dict[str, float]:
        """Metrics of how grading went. Raises UserError where too many samples could not be graded."""
        results = [sample.reward for sample in samples if sample.reward]
        check_failures(samples, results, self.config.reward.max_failed_fraction)
        rates = outcome_rates(results)
        if self.config.reward.format:
            penalties = self._format_penalties(samples)
            rates["reward/format_fraction"] = penalties.count(0.0) / max(len(samples), 1)
        return rates

    def shaped(self, samples: list[Sample]) -> list[float]:
        """The rewards of graded samples, lowered where their form is wrong."""
        scores = [sample.reward.score if sample.reward else 0.0 for sample in samples]
        return [score + penalty for score, penalty in zip(scores, self._format_penalties(samples), strict=True)]

    def _format_penalties(self, samples: list[Sample]) -> list[float]:
        return format_penalties([sample.text for sample in samples], self.config.reward.format)

    def snapshot_due(self, step: int) -> bool:
        """Whether the lagged proxy is refreshed before this step. A resumed run brings its snapshot along."""
        return step == 1 or step % self.config.algorithm.proxy_refresh_steps == 0

    def learning_rate(self, step: int) -> float:
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
        """Engines on the actor's GPUs make room for training; `sync_weights` has them back."""
        if self.weights and self.config.cluster.colocate and self.config.actor.device != "cpu":
            self.weights.release_memory()

    def sync_weights(self) -> dict[str, float]:
        """Give the engines the actor's weights; returns metrics. The first time, and every so often, the checksum of
        every tensor is compared on both sides. Raises UserError where engines then do not say what the actor says."""
        if self.weights is None:
            return {}
        before, every = self.weights.version, self.config.weight_sync.verify_every
        if before == self.weight_version and not self.weights.released:
            return {}  # a step without an update
        verify = before is None or (every > 0 and self.weight_version % every == 0)
        metrics = self.weights.sync(self.weight_version, verify=verify)
        return metrics | self.contract.check(self.weights.engines, self._log_probs)

    def _log_probs(self, rows: SequenceBatch, temperature: float) -> Array:
        """[T], of the response tokens, by the actor."""
        return self.actors.score(rows, temperature=temperature)["log_probs"]

    def log(self, metrics: dict[str, float]) -> None:
        """A step's metrics, to file and screen; then the error of a checkpoint that could not be written meanwhile."""
        if self.step:  # the line before the first step holds evaluations only
            metrics |= memory_metrics(read_beats(self.folder / "logs" / HEARTBEATS)) | self._rates(metrics)
        self.metrics.write(self.step, metrics | self.phase.flush() | self.saver.poll())
        if self.step:
            self.view.step(self.step, metrics)
            self.recording_cost.step(metrics["perf/step_seconds"], metrics.get("perf/record_seconds", 0.0))
        for finding in self.diagnosis.step(self.step, metrics):
            self.view.message(str(finding))

    def _rates(self, metrics: dict[str, float]) -> dict[str, float]:
        """How fast the actor was in its phases of the step that has these metrics."""
        seconds = metrics.get("perf/score_seconds", 0.0) + metrics.get("perf/train_seconds", 0.0)
        gpu = self.actors.gpu if self.config.actor.dtype != "float32" else None  # the rate known is that of bf16
        return rate_metrics(self.actors.take_flops(), seconds, len(self.actors.ranks), gpu.flops if gpu else None)

    def record(
        self, step: int, samples: list[Sample], advantages: Array, batch: SequenceBatch, seen: dict[str, Array]
    ) -> None:
        """A dump of the step's rollouts, at the steps that have one; of those that are not every step, one that would
        cost too much is left out."""
        settings = self.config.observability
        due = settings.rollouts_every and (step == 1 or step % settings.rollouts_every == 0)
        if due and (settings.rollouts_every == 1 or self.recording_cost.affordable):
            with self.phase("record"):
                record(
                    self.folder / "rollouts",
                    step,
                    samples,
                    advantages,
                    batch,
                    seen,
                    most_tokens=settings.rollouts_tokens,
                )
                if self.config.actor.context_parallel == 1:
                    part = candidate_positions(batch, step)
                    found = self.actors.candidates(part, temperature=self.temperature, count=CANDIDATES)
                    write_candidates(self.folder / "candidates", step, part, found)

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Traces what the actor does in the block, at the steps that the configuration names."""
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
        """One more, with these metrics. What comes next draws prompts: this is the state to go on from."""
        self.step += 1
        self.last_step = self._state(), metrics

    def save(self, metrics: dict[str, float], *, background: bool) -> None:
        """A checkpoint of this step, whose metrics these are."""
        if not self.keeps_weights:
            return
        with self.phase("checkpoint"):
            self.saver.save(self._state(), metrics, background=background and self.config.train.async_save)

    def _state(self) -> DriverState:
        return DriverState(self.step, self.weight_version, self.cursor.state(), tuple(self.buffer.groups))
