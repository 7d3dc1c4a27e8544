"""The forward passes of a step, stated once: read by training, by the checks of a configuration, and by the plan.

An update always runs forward and backward over the sequences that it trains. This module says which forwards without
gradients run besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_rl.config.methods import method_needs
from megatron_rl.config.schema import Config


@dataclass(frozen=True, slots=True)
class Passes:
    """Which policies score a step's sequences, without gradients, and why."""

    off_policy: bool
    """Whether an update may train another policy than the one that sampled. Then one forward before the first update
    fixes the log-probs of the old policy, and what else the loss needs of that policy. On-policy, the update's own
    forward provides these values."""
    ranked_by: Literal["rollout", "actor"] | None
    """Whose log-probs or entropies select tokens: those of the rollout engine, which cost no forward, or those of the
    actor before the first update, over all sequences. None: the method selects no tokens."""
    scores_dropped: bool
    """Whether sequences that no update trains are scored for the metrics. False if every sequence is trained."""
    stores_old_proxy: bool
    """Whether the forward of the old policy also stores that policy's sparse proxy."""
    lagged_proxy: bool
    """Whether a lagged snapshot scores the sequences on which its proxy can act."""
    stores_lagged_proxy: bool
    """Whether that forward also stores the snapshot's sparse proxy."""
    reference: bool
    """Whether the reference model scores the trained sequences."""

    @property
    def old_policy(self) -> bool:
        """Whether the actor scores the trained sequences before the first update."""
        return self.off_policy or self.ranked_by == "actor"

    @property
    def forwards(self) -> int:
        """Number of forwards without gradients over the trained sequences. A forward over dropped sequences does not
        count."""
        return self.old_policy + self.lagged_proxy + self.reference

    def __str__(self) -> str:
        """The forwards of a step, in one line."""
        forwards = []
        if self.ranked_by == "actor" or (self.off_policy and self.scores_dropped):
            forwards.append("current weights (all sequences)")
        elif self.off_policy:
            forwards.append("current weights (trained sequences)")
        elif self.scores_dropped:
            forwards.append("current weights (dropped sequences, for metrics)")
        if self.lagged_proxy:
            forwards.append("lagged snapshot (sequences with a token that its proxy can affect)")
        if self.reference:
            forwards.append("reference model (trained sequences)")
        return f"forwards without gradient: {', '.join(forwards) or 'none'}"


def passes_of(config: Config) -> Passes:
    """Returns the passes of a configuration. Imports a user's own loss, but no torch for the built-in ones."""
    algorithm = config.algorithm
    needs = method_needs(algorithm)
    off_policy = config.train.updates_per_rollout > 1 or config.keeps_rollouts
    drops = config.train.drop_zero_advantage and not needs.acts_without_advantage
    rule, source = needs.selection, algorithm.selection_log_probs
    by_actor = rule is not None and (rule.needs_entropy or source == "actor" or (source == "auto" and off_policy))
    lagged = needs.proxy_source == "lagged"
    return Passes(
        off_policy=off_policy,
        ranked_by=None if rule is None else "actor" if by_actor else "rollout",
        scores_dropped=drops and config.train.score_dropped,
        stores_old_proxy=off_policy and needs.proxy_source == "old" and needs.needs_proxy_kl,
        lagged_proxy=lagged,
        stores_lagged_proxy=lagged and needs.needs_proxy_kl,
        reference=algorithm.reference_kl.coefficient > 0,
    )
