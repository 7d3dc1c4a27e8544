"""What a step asks of its policies before the first update: forwards without gradients, and only those it needs.

With one update a rollout the policy in training is the one that sampled, and the update's own forward says what the
loss wants of it. With several, one forward of all rows fixes its log-probs, entropies and proxy for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_rl.batching.sequences import Array, SequenceBatch
from megatron_rl.batching.stored_proxy import StoredProxy

if TYPE_CHECKING:
    from megatron_rl.run.run import Run

Seen = dict[str, Array]
"""Name -> [T], what the actor said of each response token before the first update; NaN where it was not asked."""


def acting_rows(run: Run, advantages: Array) -> Array:
    """[N] bool, the rows that an update runs; advantages [N]. The others are counted by the mean all the same."""
    if not run.config.train.drop_zero_advantage or run.loss.acts_without_advantage:
        return np.ones(len(advantages), dtype=bool)
    return advantages != 0


def score_old_policy(run: Run, batch: SequenceBatch, advantages: Array) -> tuple[SequenceBatch, Seen]:
    """The batch with the old policy's values where the updates need them; and what the actor was seen to say."""
    acting = acting_rows(run, advantages)
    wanted = ~acting if run.config.train.score_dropped else np.zeros_like(acting)
    if run.ranks_by_actor:
        wanted = np.ones_like(acting)
    elif run.off_policy:
        wanted = wanted | acting
    rows, seen = np.flatnonzero(wanted), Seen()
    stores = run.off_policy and run.loss.proxy_source == "old" and run.loss.needs_proxy_kl
    asked = batch.with_values(proxy_wanted=_uses_proxy(run, batch)) if stores else batch
    values, proxy = run.actors.score_and_store(asked.take(rows), temperature=run.temperature)
    fill(seen, values, batch, rows)
    if run.off_policy and len(rows):
        kept = seen["kept"] == 1
        batch = batch.with_values(old_log_probs=seen["log_probs"], old_log_z=seen["log_z"], old_kept=kept)
    if stores:
        batch = _with_proxy(batch, rows, proxy)
    return batch, seen


def score_lagged_policy(run: Run, step: int, batch: SequenceBatch) -> SequenceBatch:
    """The batch with the proxy of the lagged snapshot: log q of the response tokens, -inf where its filter drops them,
    and where the loss wants it q over all of the filter.

    Only rows on which the loss can act are run: with a selected token and an advantage that lets it (a negative one).
    """
    if run.loss.proxy_source != "lagged":
        return batch
    if run.snapshot_due(step):
        run.actors.snapshot("lagged")
    acts = _uses_proxy(run, batch)
    asked = batch.with_values(proxy_wanted=acts) if run.loss.needs_proxy_kl else batch
    rows = np.unique(batch.per_token(np.arange(len(batch)))[acts])
    log_q = np.full(batch.num_response_tokens, -np.inf, dtype=np.float32)
    lagged, proxy = run.actors.score_and_store(asked.take(rows), temperature=run.temperature, weights="lagged")
    if len(rows):
        log_q[batch.token_index(rows)] = np.where(lagged["kept"], lagged["log_probs"] - lagged["log_z"], -np.inf)
    if run.loss.needs_proxy_kl:
        batch = _with_proxy(batch, rows, proxy)
    return batch.with_values(proxy_log_probs=log_q)


def score_reference(run: Run, batch: SequenceBatch, advantages: Array) -> SequenceBatch:
    """The batch with the reference model's log-probs of the response tokens, where the loss holds the policy to it."""
    if not run.config.algorithm.reference_kl.coefficient:
        return batch
    rows, seen = np.flatnonzero(acting_rows(run, advantages)), Seen()
    fill(seen, run.actors.score(batch.take(rows), temperature=run.temperature, weights="reference"), batch, rows)
    return batch.with_values(reference_log_probs=seen["log_probs"])


def _uses_proxy(run: Run, batch: SequenceBatch) -> Array:
    """[T] bool, where the proxy can matter; among all tokens as long as none is selected."""
    acts: Array = run.loss.uses_proxy(torch.from_numpy(batch.values["advantages"])).numpy()
    return acts & batch.values["selected"] if "selected" in batch.values else acts


def _with_proxy(batch: SequenceBatch, rows: Array, proxy: StoredProxy) -> SequenceBatch:
    """proxy: over the tokens of `rows`."""
    return replace(batch, proxy=StoredProxy.join(batch.num_response_tokens, [(batch.token_index(rows), proxy)]))


def fill(seen: Seen, part: dict[str, Array], batch: SequenceBatch, rows: Array) -> None:
    """Write the values of some rows into the whole batch's."""
    index = batch.token_index(rows)
    for name, values in part.items():
        seen.setdefault(name, np.full(batch.num_response_tokens, np.nan, dtype=np.float32))[index] = values
