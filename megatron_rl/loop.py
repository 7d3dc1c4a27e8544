"""The whole algorithm, one line a room: rollout, reward, advantage, selection, update, weight sync.

`train` is the run from start to end; `rl_step` is one step of it. `session/` opens a run and holds its rooms.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from rich.console import Console

import lpreg
from megatron_rl.batching.rows import Array, Rows, rows_of
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.evaluation.run_suites import evaluate
from megatron_rl.observability.step_metrics import loss_metrics, policy_metrics, rollout_metrics, selection_metrics
from megatron_rl.observability.summary import print_summary
from megatron_rl.rollout.collect import collect
from megatron_rl.session.finish import finish
from megatron_rl.session.interrupt import stop_on_interrupt
from megatron_rl.session.opening import open_run
from megatron_rl.session.run import Run


def train(config: Config) -> None:
    """Train to the last step, or to a clean stop with a checkpoint when interrupted."""
    with open_run(config) as run, stop_on_interrupt() as stop:
        if run.saved_step is None:  # a resumed run has its first evaluation already
            run.log(evaluate(run))
        while run.step < config.train.steps and not stop.requested:
            metrics = rl_step(run, run.step + 1)
            run.step += 1
            if run.due(config.evaluation.every):
                metrics |= evaluate(run)
            run.log(metrics)
            if run.due(config.train.save_every):
                run.save()
        run.save()
        finish(run)
    print_summary(Console(), config.run.folder)


def rl_step(run: Run, step: int) -> dict[str, float]:
    """One on-policy step. Returns its metrics; the run is left with new weights in actor and engines."""
    config, start = run.config, time.perf_counter()
    with run.phase("rollout"):
        samples = collect(run.engines, run.next_prompts(), run.sampling(step), run.inputs.tokenizer)
    with run.phase("reward"):
        rewards = run.grade(samples)
    advantages = lpreg.group_advantages(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor([sample.group for sample in samples]),
        estimator=config.algorithm.advantage,
    ).numpy()
    batch = rows_of(samples)
    batch = batch.with_values(advantages=batch.per_token(advantages).astype(np.float32))
    with run.phase("select"):
        batch, metrics = select(run, step, batch)
    with run.phase("train"):
        seen, update_metrics = update(run, step, batch, advantages)
    with run.phase("weight_sync"):
        run.sync_weights()
    run.dump_rollouts(step, samples, advantages, batch, seen)

    metrics |= update_metrics | rollout_metrics(samples, advantages) | policy_metrics(batch, seen) | run.grading_metrics
    metrics |= run.phase.flush()
    metrics["perf/step_seconds"] = time.perf_counter() - start
    metrics["perf/tokens_per_second"] = batch.num_response_tokens / metrics["perf/step_seconds"]
    return metrics


def select(run: Run, step: int, batch: Rows) -> tuple[Rows, dict[str, float]]:
    """What the loss needs to know before the first backward: the tokens it selects, and the lagged proxy there.

    The driver holds the values of the whole batch, so the selection is exact whatever the layout of the actor.
    """
    algorithm, loss, metrics = run.config.algorithm, run.loss, {}
    if loss.proxy_source == "lagged" and run.snapshot_due(step):
        run.actors.snapshot()
    if (rule := loss.selection) is not None:
        known = {"log_probs": batch.values["rollout_log_probs"], "advantages": batch.values["advantages"]}
        if algorithm.selection_log_probs == "actor" or rule.needs_entropy:
            seen = run.actors.score(batch, temperature=run.temperature)
            known |= {name: seen[name] for name in ("log_probs", "entropy")}
        values = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in known.items()}
        every_token = torch.ones(batch.num_response_tokens, dtype=torch.bool)
        selection = lpreg.apply_rule(
            rule,
            every_token,
            log_probs=values["log_probs"],
            entropy=values.get("entropy"),
            advantages=values["advantages"],
            seed=run.sampling(step).seed,
        )
        batch = batch.with_values(selected=selection.mask.numpy())
        metrics = selection_metrics(rule, selection)
    if loss.proxy_source == "lagged":
        batch = batch.with_values(proxy_log_probs=lagged_proxy(run, batch))
    return batch, metrics


def lagged_proxy(run: Run, batch: Rows) -> Array:
    """[T] log q of the sampled tokens under the lagged snapshot, -inf where its filter drops them.

    Only rows on which the loss can act are run: with a selected token and an advantage that lets it (a negative one).
    """
    acts = run.loss.uses_proxy(torch.from_numpy(batch.values["advantages"])).numpy()
    acts = acts & batch.values.get("selected", True)
    rows = np.unique(batch.per_token(np.arange(len(batch)))[acts])
    log_q = np.full(batch.num_response_tokens, -np.inf, dtype=np.float32)
    if len(rows):
        lagged = run.actors.score(batch.take(rows), temperature=run.temperature, weights="lagged")
        log_q[batch.token_index(rows)] = np.where(lagged["kept"], lagged["log_probs"] - lagged["log_z"], -np.inf)
    return log_q


def update(run: Run, step: int, batch: Rows, advantages: Array) -> tuple[dict[str, Array], dict[str, float]]:
    """One optimizer step. Returns what the actor saw of each token before it ([T], NaN where it did not look); metrics.

    Groups without an advantage mostly have no gradient: then they are left out of the update, but not of the mean.
    """
    settings, lr = run.config.train, run.learning_rate(step)
    drop = settings.drop_zero_advantage and not run.loss.acts_without_advantage
    live = np.flatnonzero(advantages) if drop else np.arange(len(batch))
    dropped = np.setdiff1d(np.arange(len(batch)), live)
    seen: dict[str, Array] = {}
    if settings.score_dropped and len(dropped):
        part = run.actors.score(batch.take(dropped), temperature=run.temperature)
        _fill(seen, part, batch, dropped)
    metrics = {"train/loss": 0.0, "train/grad_norm": 0.0, "train/lr": lr, "train/row_fraction": len(live) / len(batch)}
    if len(live):
        result = run.actors.train(
            batch.take(live), lr=lr, denominator=denominator(run.loss, batch), temperature=run.temperature
        )
        if not np.isfinite([result.loss, result.grad_norm]).all():
            raise UserError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}. The weights are spoilt and were "
                f"not saved: go on from the last checkpoint with resume=auto and a lower actor.optimizer.lr"
            )
        run.weight_version += 1
        _fill(seen, result.values, batch, live)
        metrics |= {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
        metrics |= loss_metrics(result.metrics, batch.num_response_tokens)
    return seen, metrics


def denominator(loss: lpreg.PolicyLoss, batch: Rows) -> int:
    """What the loss is a mean over, dropped rows included."""
    if loss.denominator_counts == "selected_tokens":
        return int(batch.values["selected"].sum())
    return len(batch) if loss.denominator_counts == "sequences" else batch.num_response_tokens


def _fill(seen: dict[str, Array], part: dict[str, Array], batch: Rows, rows: Array) -> None:
    """Write the values of some rows into the whole batch's."""
    index = batch.token_index(rows)
    for name, values in part.items():
        seen.setdefault(name, np.full(batch.num_response_tokens, np.nan, dtype=np.float32))[index] = values
