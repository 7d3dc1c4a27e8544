"""What a run leaves when it stops: a checkpoint, the HF export with its proof, and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_rl.batching.sequences import rows_of
from megatron_rl.checkpoint.export import export_hf, largest_logit_difference
from megatron_rl.observability.report import write_report
from megatron_rl.rollout.sample import collect

if TYPE_CHECKING:
    from megatron_rl.run.run import Run

CHECKED_PROMPTS = 4
TOLERANCE = {"float32": (1e-5, 1e-6)}
"""Largest difference of a logit between the actor and its export: absolute, or as a share of the largest logit, with
which rounding grows, whichever is more. bf16 rounds every layer's output differently: no limit."""


def finish(run: Run) -> None:
    """After the last step, or a stop before it. The export is written of a finished run only."""
    config = run.config
    if not run.keeps_weights:
        run.view.message("nothing is exported: this run looked into rollouts or a loss")
    elif run.step == config.train.steps:
        run.view.phase("exporting")
        export_hf(run.folder / "hf", config.model.path, run.actors.export_hf)
        run.view.message(check_export(run))
    else:
        run.view.message(
            f"stopped after step {run.step} of {config.train.steps}; go on with the same command and "
            f"run.folder={run.folder} resume=auto"
        )
    run.view.message(f"report: {write_report(run.folder)}")


def check_export(run: Run) -> str:
    """Compare the export, reloaded by plain transformers, with the actor on a few responses; raises if they differ."""
    config = run.config
    samples = collect(
        run.engines, run.inputs.train.prompts[:CHECKED_PROMPTS], run.evaluation_sampling(), run.inputs.tokenizer
    )
    rows = rows_of(samples)
    logits = run.actors.logits(rows)
    difference = largest_logit_difference(run.folder / "hf", rows, logits, config.actor.dtype)
    absolute, share = TOLERANCE.get(config.actor.dtype, (np.inf, 0.0))
    limit = max(absolute, share * float(np.abs(logits).max()))
    if not difference <= limit:  # a nan is a difference too
        raise RuntimeError(
            f"the export {run.folder / 'hf'} differs from the actor: logits by {difference:.2e} > {limit:.1e}"
        )
    return f"export reloaded with transformers: largest logit difference to the actor {difference:.1e}"
