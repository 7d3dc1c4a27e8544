"""Run every suite with the run's engines, rewards and actor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.rows import rows_of
from megatron_rl.evaluation.suite import accuracy, probe_rows
from megatron_rl.rollout.collect import collect

if TYPE_CHECKING:
    from megatron_rl.session.run import Run


def evaluate(run: Run) -> dict[str, float]:
    """Metrics `eval/<suite>/...`. Every evaluation draws with the same random numbers, so that curves are smooth."""
    settings = run.config.evaluation
    k = settings.samples_per_prompt
    metrics: dict[str, float] = {}
    with run.phase("evaluate"):
        for suite, prompts in run.inputs.suites.items():
            samples = collect(run.engines, prompts, run.evaluation_sampling(), run.inputs.tokenizer)
            run.grade(samples)
            found = accuracy(samples, k)
            rows = rows_of(samples)
            found["entropy"] = float(run.actors.score(rows, temperature=run.temperature)["entropy"].mean())
            for name, (after, token) in run.inputs.probes.items():
                part, place = probe_rows(rows, after, token)
                if place.any():
                    scored = run.actors.score(part, temperature=run.temperature)["log_probs"]
                    found[name] = float(np.exp(scored[place]).mean())
            metrics |= {f"eval/{suite}/{name}": value for name, value in found.items()}
    run.view.eval(run.step, metrics)
    return metrics
