"""Scores of a step's policies before the first update: forwards without gradients, and only those that are needed.

`config.passes.passes_of` says which policies score which sequences, and why. Legend: N sequences, T sampled tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_rl.batching.arrays import Indices, Mask
from megatron_rl.batching.stored_proxy import StoredProxy
from megatron_rl.training.batch import TrainingBatch
from megatron_rl.training.learner import Learner


def score_old_policy(learner: Learner, batch: TrainingBatch) -> TrainingBatch:
    """Returns the batch with the actor's scores before the first update, and with the old policy's values if updates
    are off-policy."""
    passes, trained = learner.passes, learner.trained(batch)
    scored = np.full(len(batch), passes.ranked_by == "actor")
    if passes.off_policy:
        scored |= trained
    if passes.scores_dropped:
        scored |= ~trained
    rows = np.flatnonzero(scored)
    asked = batch.sequences.only(())
    if passes.stores_old_proxy:
        asked = asked.with_values(proxy_wanted=_uses_proxy(learner, batch))
    scores, proxy = learner.actors.score_and_store(asked.take(rows), temperature=learner.temperature)
    batch = batch.with_scores(scores, rows)
    if passes.off_policy and len(rows):
        batch = batch.with_values(
            old_log_probs=batch.scores["log_probs"],
            old_log_z=batch.scores["log_z"],
            old_in_filter=batch.scores["in_filter"] == 1,
        )
    return _with_proxy(batch, rows, proxy) if passes.stores_old_proxy else batch


def score_lagged_policy(learner: Learner, step: int, batch: TrainingBatch) -> TrainingBatch:
    """Returns the batch with the proxy of the lagged snapshot: log q of each sampled token, -inf if the snapshot's
    filter drops the token; and the sparse proxy distribution if the loss needs it.

    Only sequences on which the loss can act are scored: those with a selected token whose advantage lets the proxy
    matter.
    """
    if not learner.passes.lagged_proxy:
        return batch
    if step == 1 or step % learner.config.algorithm.proxy_refresh_steps == 0:  # a resumed run restores its snapshot
        learner.actors.snapshot("lagged")
    used, sequences = _uses_proxy(learner, batch), batch.sequences
    asked = sequences.only(())
    if learner.passes.stores_lagged_proxy:
        asked = asked.with_values(proxy_wanted=used)
    rows = np.unique(sequences.per_token(np.arange(len(batch), dtype=np.int32))[used])
    log_q = np.full(len(used), -np.inf, dtype=np.float32)
    lagged, proxy = learner.actors.score_and_store(asked.take(rows), temperature=learner.temperature, weights="lagged")
    if len(rows):
        found = np.where(lagged["in_filter"], lagged["log_probs"] - lagged["log_z"], -np.inf)
        sequences.set_values(log_q, rows, found)
    if learner.passes.stores_lagged_proxy:
        batch = _with_proxy(batch, rows, proxy)
    return batch.with_values(proxy_log_probs=log_q)


def score_reference(learner: Learner, batch: TrainingBatch) -> TrainingBatch:
    """Returns the batch with the reference model's log-probs of the trained sequences, if the loss needs these."""
    if not learner.passes.reference:
        return batch
    rows = np.flatnonzero(learner.trained(batch))
    part = batch.sequences.only(()).take(rows)
    scored = learner.actors.score(part, temperature=learner.temperature, weights="reference")["log_probs"]
    log_probs = np.full(batch.sequences.num_sampled_tokens, np.nan, dtype=np.float32)
    batch.sequences.set_values(log_probs, rows, scored)
    return batch.with_values(reference_log_probs=log_probs)


def _uses_proxy(learner: Learner, batch: TrainingBatch) -> Mask:
    """[T], True where the proxy can matter: among the selected tokens, or among all counted tokens before the
    selection."""
    values = batch.sequences.values
    used: Mask = learner.loss.uses_proxy(torch.from_numpy(values["advantages"])).numpy()
    return used & (values["selected"] if "selected" in values else batch.sequences.per_token(batch.counted))


def _with_proxy(batch: TrainingBatch, rows: Indices, proxy: StoredProxy) -> TrainingBatch:
    """`proxy` covers the sampled tokens of `rows`."""
    sequences = batch.sequences
    joined = StoredProxy.join(sequences.num_sampled_tokens, [(sequences.token_index(rows), proxy)])
    return replace(batch, sequences=replace(sequences, proxy=joined))
