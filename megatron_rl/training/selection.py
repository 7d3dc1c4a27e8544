"""Selection of the tokens that the method acts on, ranked over all counted tokens of the step, whatever the layout.

One selection serves all updates of a step: the ranking is that of the policy that sampled, and a token stays selected
or not, however its probability changes between updates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import lpreg
from megatron_rl.batching.arrays import Array
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner
from megatron_rl.training.metrics import selection_metrics


def select(learner: Learner, batch: TrainingBatch, seed: int) -> tuple[TrainingBatch, dict[str, float]]:
    """Returns the batch with its selected tokens marked, and metrics of the threshold. `seed`: for random rules."""
    rule, sequences = learner.loss.selection, batch.sequences
    if rule is None:
        return batch, {}
    log_probs = (
        batch.scores["log_probs"] if learner.passes.ranked_by == "actor" else sequences.values["rollout_log_probs"]
    )
    selection = lpreg.apply_rule(
        rule,
        _tensor(sequences.per_token(batch.counted)),
        log_probs=_tensor(log_probs),
        entropy=_tensor(batch.scores["entropy"]) if rule.needs_entropy else None,
        advantages=_tensor(sequences.values["advantages"]),
        seed=seed,
    )
    mask = selection.mask.numpy()
    if sequences.proxy is not None:  # it was stored before the selection was known
        sequences = replace(sequences, proxy=sequences.proxy.where(mask))
    return replace(batch, sequences=sequences.with_values(selected=mask)), selection_metrics(rule, selection)


def selection_overlap(learner: Learner, batch: TrainingBatch) -> dict[str, float]:
    """Returns the share of the selected tokens on which the rankings of engine and actor agree, if both are known."""
    rule, scored, values = learner.loss.selection, batch.scores.get("log_probs"), batch.sequences.values
    counted = batch.sequences.per_token(batch.counted)
    if rule is None or rule.kind != "lowest_log_prob" or scored is None or not np.isfinite(scored[counted]).all():
        return {}
    # The batch has the selection by one of the two already.
    other = values["rollout_log_probs"] if learner.passes.ranked_by == "actor" else scored
    selection = lpreg.select_lowest(_tensor(other), _tensor(counted), rule.fraction)
    selected = values["selected"]
    both = int((selected & selection.mask.numpy()).sum())
    return {"lpreg/selection_overlap": both / max(int(selected.sum()), selection.count, 1)}


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
