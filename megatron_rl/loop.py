"""The whole algorithm, one line per room: rollouts, advantages, old policy, selection, updates, weight sync.

`train` is the run from start to end; `rl_step` is one step of it. `run/` opens a run and holds its rooms; `training/`
has the details of what happens between the reward and the weight sync.
"""

from __future__ import annotations

import time

from rich.console import Console

from megatron_rl.config import Config
from megatron_rl.observability.summary import print_summary
from megatron_rl.run.evaluate import evaluate
from megatron_rl.run.finish import finish
from megatron_rl.run.interrupt import Stop, stop_on_interrupt
from megatron_rl.run.opening import open_run
from megatron_rl.run.outage import checkpoint_on_outage
from megatron_rl.run.restart import Attempts
from megatron_rl.run.run import Run
from megatron_rl.training.batch import TrainingBatch, training_batch
from megatron_rl.training.metrics import policy_metrics, rollout_metrics
from megatron_rl.training.policies import score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select, selection_overlap
from megatron_rl.training.update import update


def train(config: Config) -> None:
    """Trains to the last step, or to a clean stop with a checkpoint if the run is interrupted or loses its engines.

    If the run loses ranks of its actor, it goes on from its newest checkpoint.
    """
    attempts = Attempts(config)
    while not attempts.ended:
        with (
            attempts,
            open_run(attempts.config) as run,
            stop_on_interrupt(run.view.message) as stop,
            checkpoint_on_outage(run),
        ):
            attempts.opened(run, stop)
            _take_steps(run, stop)
            finish(run)
    print_summary(Console(), config.run.folder)


def _take_steps(run: Run, stop: Stop) -> None:
    config = run.config
    if not run.resumed:
        run.log(evaluate(run))
    stopping = stop.requested
    while run.step < config.train.steps and not stopping:
        metrics = rl_step(run, run.step + 1)
        run.step_done(metrics)
        if run.due(config.evaluation.every):
            metrics |= evaluate(run)
        stopping = stop.requested or run.step == config.train.steps
        if stopping or run.due(config.train.save_every):
            run.save(metrics, background=not stopping)
        run.log(metrics)


def rl_step(run: Run, step: int) -> dict[str, float]:
    """One step: rollouts, and one or more updates on them. Returns its metrics; actor and engines have new weights."""
    start = time.perf_counter()
    rollouts = run.rollouts.collect(step, run.learner.weight_version)
    batch, metrics = training_batch(run.config, rollouts, run.grading.shaped)
    learned: dict[str, float] = {}
    if not run.config.train.rollout_only:
        batch, learned = learn(run, step, batch)
    run.recorder.record(step, rollouts, batch)

    metrics |= rollouts.metrics | rollout_metrics(rollouts, batch.advantages)
    metrics |= policy_metrics(batch.sequences, batch.scores, batch.fresh) | learned
    metrics |= run.phase.flush()
    metrics |= run.rates(metrics)
    metrics["perf/step_seconds"] = time.perf_counter() - start
    metrics["perf/tokens_per_second"] = batch.sequences.num_sampled_tokens / metrics["perf/step_seconds"]
    return metrics


def learn(run: Run, step: int, batch: TrainingBatch) -> tuple[TrainingBatch, dict[str, float]]:
    """The updates on a batch. Returns the batch with everything that was found about its tokens, and metrics."""
    learner, seed = run.learner, run.seed(step)
    run.release_engines()
    with run.measured(step):
        with run.phase("score"):
            batch = score_old_policy(learner, batch)
        with run.phase("select"):
            batch, metrics = select(learner, batch, seed)
        with run.phase("score"):
            batch = score_lagged_policy(learner, step, batch)
            batch = score_reference(learner, batch)
        with run.phase("train"):
            batch, updated = update(learner, step, batch, lr=run.learning_rate(step), seed=seed)
    with run.phase("weight_sync"):
        updated |= run.sync_weights()
    return batch, metrics | selection_overlap(learner, batch) | updated
