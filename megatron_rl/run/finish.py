"""Results of a run when it stops: the checked HF export, and the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.sequences import sequences_of
from megatron_rl.checkpoint.export import export_hf, largest_logit_difference
from megatron_rl.errors import UserError
from megatron_rl.observability.provenance import write_beside_export
from megatron_rl.observability.report import write_report
from megatron_rl.plan.memory import TOKENS_OF_EXPORT_CHECK
from megatron_rl.run.sampling import evaluation_sampling

if TYPE_CHECKING:
    from megatron_rl.run.run import Run

CHECKED_PROMPTS = 4
CHECKED_TOKENS = TOKENS_OF_EXPORT_CHECK // CHECKED_PROMPTS
"""Tokens of the response to each prompt at which logits are compared. Those of whole responses would not fit into
memory: a token takes half a megabyte."""
TOLERANCE = {"float32": (1e-5, 1e-6)}
"""Largest allowed difference of a logit between the actor and its export: absolute, or as a share of the largest logit,
because rounding errors grow with it; the larger of the two holds. bf16 has no limit: it rounds every layer's output."""


def finish(run: Run) -> None:
    """Runs after the last step, or after an earlier stop. Only a finished run is exported."""
    config = run.config
    if not run.keeps_weights:
        run.view.message("nothing is exported: this run only studied rollouts or a loss")
    elif run.step == config.train.steps:
        run.view.phase("exporting")
        export_hf(run.folder / "hf", config.model.path, run.actors.export_hf)
        run.view.message(check_export(run))
        write_beside_export(run.provenance.finish(), run.folder / "hf")
    else:
        run.view.message(
            f"stopped after step {run.step} of {config.train.steps}; continue with the same command and "
            f"run.folder={run.folder} resume=auto"
        )
    run.view.phase("writing the report")
    try:
        run.view.message(f"report: {write_report(run.folder)}")
    except UserError as error:  # such as a damaged rollout dump: everything else of the run is there
        run.view.message(f"NO REPORT: {error} Later: megatron-rl report {run.folder}")


def check_export(run: Run) -> str:
    """Compares the export, reloaded by plain transformers, with the actor on a few responses.

    Raises:
        RuntimeError: their logits differ.
    """
    config = run.config
    assert run.engines, "only a run with engines is exported"
    prompts = run.inputs.train.prompts[:CHECKED_PROMPTS]
    sampling = evaluation_sampling(config, run.inputs.stop_token_ids)
    sampling = replace(sampling, n=1, max_tokens=min(sampling.max_tokens, CHECKED_TOKENS))
    answers = run.engines.generate(prompts, sampling)
    rows = sequences_of(
        (prompt.token_ids, response) for prompt, group in zip(prompts, answers, strict=True) for response in group
    )
    logits = run.actors.logits(rows)
    difference = largest_logit_difference(run.folder / "hf", rows, logits, config.actor.dtype)
    absolute, share = TOLERANCE.get(config.actor.dtype, (np.inf, 0.0))
    limit = max(absolute, share * float(np.abs(logits).max()))
    if not difference <= limit:  # NaN also counts as a difference
        raise RuntimeError(
            f"the export {run.folder / 'hf'} differs from the actor: logits by {difference:.2e} > {limit:.1e}"
        )
    return f"export reloaded with transformers: largest logit difference to the actor {difference:.1e}"
