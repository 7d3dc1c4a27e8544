"""Evaluation during training: every suite with the run's engines, rewards and actor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.sequences import rows_of
from megatron_rl.evaluation.measures import Measures, macro
from megatron_rl.evaluation.probes import probe_rows
from megatron_rl.evaluation.problems import problems_of, write_problems
from megatron_rl.rollout.sample import collect

if TYPE_CHECKING:
    from megatron_rl.run.run import Run
    from megatron_rl.types import Sample


def evaluate(run: Run) -> dict[str, float]:
    """Metrics `eval/<suite>/...`, and `evaluations/step_*/<suite>.parquet` in the run's folder.

    Every evaluation draws with the same random numbers, so that curves are smooth.
    """
    metrics: dict[str, float] = {}
    suites = []
    with run.phase("evaluate"):
        for name, prompts in run.inputs.suites.items():
            sampling = run.evaluation_sampling(run.config.evaluation.suites[name])
            samples = collect(run.engines, prompts, sampling, run.inputs.tokenizer)
            run.grade(samples)
            run.check_grades(samples)
            problems = problems_of(samples)
            write_problems(run.folder / "evaluations" / f"step_{run.step:06d}" / f"{name}.parquet", problems)
            suites.append(Measures(problems))
            found = suites[-1].metrics() | _seen_by_actor(run, samples)
            metrics |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
    if len(suites) > 1:
        metrics["eval/macro_mean/avg"] = macro(suites).value
    run.view.eval(run.step, metrics)
    return metrics


def _seen_by_actor(run: Run, samples: list[Sample]) -> dict[str, float]:
    """Entropy, and the probes."""
    rows = rows_of(samples)
    found = {"entropy": float(run.actors.score(rows, temperature=run.temperature)["entropy"].mean())}
    for name, (after, token) in run.inputs.probes.items():
        part, place = probe_rows(rows, after, token)
        if place.any():
            scored = run.actors.score(part, temperature=run.temperature)["log_probs"]
            found[name] = float(np.exp(scored[place]).mean())
    return found
