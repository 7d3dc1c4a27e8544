"""Which tokens the method acts on, ranked over all response tokens of the step whatever the layout of the actor.

One selection serves all updates of a step: the ranking is of the policy that sampled, and a token stays selected (or
not) however its probability moves between updates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

import lpreg
from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.observability.step_metrics import selection_metrics
from megatron_rl.training.policies import Seen

if TYPE_CHECKING:
    from megatron_rl.run.run import Run


def select(run: Run, step: int, batch: SequenceBatch, seen: Seen) -> tuple[SequenceBatch, dict[str, float]]:
    """The batch with its selected tokens marked, and where the ranking was cut."""
    rule = run.loss.selection
    if rule is None:
        return batch, {}
    log_probs = seen["log_probs"] if run.ranks_by_actor else batch.values["rollout_log_probs"]
    selection = lpreg.apply_rule(
        rule,
        torch.ones(batch.num_response_tokens, dtype=torch.bool),
        log_probs=_tensor(log_probs),
        entropy=_tensor(seen["entropy"]) if rule.needs_entropy else None,
        advantages=_tensor(batch.values["advantages"]),
        seed=run.sampling(step).seed,
    )
    mask = selection.mask.numpy()
    if batch.proxy is not None:  # it was stored before anyone could know which tokens would be selected
        batch = replace(batch, proxy=batch.proxy.where(mask))
    return batch.with_values(selected=mask), selection_metrics(rule, selection)


def selection_overlap(run: Run, batch: SequenceBatch, seen: Seen) -> dict[str, float]:
    """Share of the lowest log-probs that the engine's and the actor's ranking agree on, where both are known."""
    rule = run.loss.selection
    if rule is None or rule.kind != "lowest_log_prob" or not np.isfinite(seen.get("log_probs", np.nan)).all():
        return {}
    eligible = torch.ones(batch.num_response_tokens, dtype=torch.bool)
    sources = (batch.values["rollout_log_probs"], seen["log_probs"])
    rollout, actor = (lpreg.select_lowest(_tensor(values), eligible, rule.fraction) for values in sources)
    return {"lpreg/selection_overlap": int((rollout.mask & actor.mask).sum()) / max(rollout.count, actor.count)}


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
