"""Evaluation during training: every suite with the run's engines, verifier and actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.config.evaluation import MACRO_MEAN
from megatron_rl.evaluation.measures import Measures, macro
from megatron_rl.evaluation.probes import probe_rows
from megatron_rl.evaluation.problems import problems_of, write_problems
from megatron_rl.run.sampling import evaluation_sampling
from megatron_rl.training.metrics import agent_metrics
from megatron_rl.types import AgentResponse, Prompt, Response, Sample

if TYPE_CHECKING:
    from megatron_rl.run.run import Run

IN_EVALUATIONS = ("agent/turns_mean", "agent/tool_calls_mean", "agent/tool_errors_mean")


def evaluate(run: Run) -> dict[str, float]:
    """Returns metrics `eval/<suite>/...`; writes `evaluations/step_*/<suite>.parquet` into the run's folder.

    Every evaluation draws with the same random numbers, so that curves are smooth.
    """
    metrics: dict[str, float] = {}
    suites = []
    with run.phase("evaluate"):
        for name, prompts in run.inputs.suites.items():
            assert run.sampler, "a run that replays rollouts has no suites"
            settings = run.config.evaluation.suites[name]
            sampling = evaluation_sampling(run.config, run.inputs.stop_token_ids, settings)
            groups = zip(prompts, run.sampler.generate(prompts, sampling), strict=True)
            pairs = [(prompt, response) for prompt, responses in groups for response in responses]
            results = run.grading.grade(pairs)
            run.grading.check([(prompt, result) for (prompt, _), result in zip(pairs, results, strict=True)])
            problems = problems_of([Sample(prompt, response) for prompt, response in pairs], results)
            write_problems(run.folder / "evaluations" / f"step_{run.step:06d}" / f"{name}.parquet", problems)
            suites.append(Measures(problems))
            batch = sequences_of((prompt.token_ids, response) for prompt, response in pairs)
            found = suites[-1].metrics() | _of_agent(pairs) | _scored_by_actor(run, batch)
            metrics |= {f"eval/{name}/{metric}": value for metric, value in found.items()}
    if len(suites) > 1 and any(suite.failed_fraction < 1 for suite in suites):
        metrics[MACRO_MEAN] = macro(suites).value
    run.view.eval(run.step, metrics)
    return metrics


def _of_agent(pairs: Sequence[tuple[Prompt, Response]]) -> dict[str, float]:
    metrics = agent_metrics([response for _, response in pairs if isinstance(response, AgentResponse)])
    return {name.removeprefix("agent/"): value for name, value in metrics.items() if name in IN_EVALUATIONS}


def _scored_by_actor(run: Run, batch: SequenceBatch) -> dict[str, float]:
    """Returns the mean entropy of the sampled tokens, and the mean probability of each probe's token."""
    temperature = run.learner.temperature
    found = {"entropy": float(run.actors.score(batch, temperature=temperature)["entropy"].mean())}
    for name, (after, token) in run.inputs.probes.items():
        part, place = probe_rows(batch, after, token)
        if place.any():
            scored = run.actors.score(part, temperature=temperature)["log_probs"]
            found[name] = float(np.exp(scored[place]).mean())
    return found
