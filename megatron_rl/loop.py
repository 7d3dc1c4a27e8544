"""The whole algorithm, one line a room: rollout, reward, advantage, old policy, selection, updates, weight sync.

`train` is the run from start to end; `rl_step` is one step of it. `session/` opens a run and holds its rooms;
`training/` has the details of what happens between reward and weight sync.
"""

from __future__ import annotations

import time

import numpy as np
from rich.console import Console

from megatron_rl.batching.sequences import Array, SequenceBatch, rows_of
from megatron_rl.config import Config
from megatron_rl.evaluation.run_suites import evaluate
from megatron_rl.observability.step_metrics import policy_metrics, rollout_metrics
from megatron_rl.observability.summary import print_summary
from megatron_rl.rollout.collector import roll_out
from megatron_rl.run.finish import finish
from megatron_rl.run.interrupt import stop_on_interrupt
from megatron_rl.run.opening import open_run
from megatron_rl.run.outage import checkpoint_on_outage
from megatron_rl.run.run import Run
from megatron_rl.training.advantages import advantages_of
from megatron_rl.training.policies import Seen, score_lagged_policy, score_old_policy, score_reference
from megatron_rl.training.selection import select, selection_overlap
from megatron_rl.training.update import update
from megatron_rl.types import Sample


def train(config: Config) -> None:
    """Train to the last step, or to a clean stop with a checkpoint: when interrupted, or left without engines."""
    with open_run(config) as run, stop_on_interrupt() as stop, checkpoint_on_outage(run):
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
        finish(run)
    print_summary(Console(), config.run.folder)


def rl_step(run: Run, step: int) -> dict[str, float]:
    """One step: rollouts, and one or more updates on them. Returns its metrics; actor and engines have new weights."""
    start = time.perf_counter()
    rollouts = roll_out(run, step)
    samples = rollouts.samples
    advantages, metrics = advantages_of(run.config, rollouts)
    batch = rows_of(samples)
    batch = batch.with_values(advantages=batch.per_token(advantages).astype(np.float32))
    seen: Seen = {}
    learned: dict[str, float] = {}
    if not run.config.train.rollout_only:
        batch, seen, learned = learn(run, step, batch, samples, advantages)
    run.record(step, samples, advantages, batch, seen)

    metrics |= rollouts.metrics | rollout_metrics(rollouts.drawn, rollouts.teaching(advantages))
    metrics |= policy_metrics(batch, seen, rollouts.fresh) | learned
    metrics |= run.phase.flush()
    metrics["perf/step_seconds"] = time.perf_counter() - start
    metrics["perf/tokens_per_second"] = batch.num_response_tokens / metrics["perf/step_seconds"]
    return metrics


def learn(
    run: Run, step: int, batch: SequenceBatch, samples: list[Sample], advantages: Array
) -> tuple[SequenceBatch, Seen, dict[str, float]]:
    """The updates on a batch. Returns it with all that was found out, what the actor saw of its tokens, and metrics."""
    run.release_engines()
    with run.profiled(step):
        with run.phase("score"):
            batch, seen = score_old_policy(run, batch, advantages)
        with run.phase("select"):
            batch, selected = select(run, step, batch, seen)
        with run.phase("score"):
            batch = score_lagged_policy(run, step, batch)
            batch = score_reference(run, batch, advantages)
        with run.phase("train"):
            updated = update(run, step, batch, samples, advantages, seen)
    with run.phase("weight_sync"):
        updated |= run.sync_weights()
    return batch, seen, selected | selection_overlap(run, batch, seen) | updated
