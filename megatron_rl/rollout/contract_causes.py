"""Why an engine's log-probs differ from the actor's: each known cause leaves a trace of its own.

Legend: T tokens that an engine sampled; `said` [T], its log-probs of them; `actors` [T], the actor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.rollout.engines.kind import server_kinds

Score = Callable[[SequenceBatch, float], Array]
"""(rows, temperature) -> [T], log-probs of the response tokens by the actor as it is now."""

WIDEST = 4.0
"""Temperatures are tried from a fourth of the right one to four times as much."""
TRIALS = 24
FITS = 0.05
"""A temperature explains a difference when it leaves less than this share of it."""
AS_IF_ROUNDED = 0.03
"""Nats in the mean: what half precision can do."""


def likely_cause(
    rows: SequenceBatch,
    actors: Array,
    score: Score,
    *,
    temperature: float,
    hold: Callable[[Array], bool],
    before: Mapping[tuple[int, ...], float],
) -> str:
    """A sentence with a remedy. hold: whether absolute differences are small enough; before: `paths` of what the actor
    said when engines last agreed."""
    said = rows.values["rollout_log_probs"].astype(np.float64)
    if not np.isfinite(said).all():
        return "some of the engine's are no numbers: its log says more."
    if _are_those_of(rows, said, before, hold):
        return (
            "weights not synced: it says what the actor said before the last updates. Do other processes load weights "
            "into this server, or does it ignore them? Its log may say more; try weight_sync.transport=disk."
        )
    if temperature != 1 and hold(np.abs(said - score(rows, 1.0))):
        remedies = ", or ".join(kind.processed_log_probs for kind in server_kinds())
        return (
            f"raw instead of processed log-probs: they are those at temperature 1, not at {temperature:g} "
            f"(rollout.temperature). Remedy: {remedies}. Look at rollout.server.arguments and "
            "rollout.server.environment, or at how the server that was attached to was started."
        )
    if fitted := _fitted_temperature(rows, said, actors, score, temperature):
        return (
            f"wrong temperature: they are those at {fitted:.3g}, not at {temperature:g} (rollout.temperature). Does "
            "something between us and the server, or an argument of it, set another?"
        )
    higher = said - actors
    if higher.mean() > 0 and hold(np.maximum(-higher, 0.0)):
        return (
            f"truncated sampling (top-p, top-k or min-p): no token's is lower than the actor's, as if "
            f"{1 - math.exp(-higher.mean()):.1%} of the distribution had been cut off and the rest scaled up. Such "
            "settings come with an argument of the server or a generation_config.json that it reads."
        )
    if np.abs(higher).mean() < AS_IF_ROUNDED:
        return (
            "another precision: they differ as by rounding. Look for --dtype, --quantization or --kv-cache-dtype in "
            "rollout.server.arguments. Where that is wanted, raise rollout.contract.max_difference and mean_difference."
        )
    return (
        "none of the known ones alone (raw log-probs, temperature, truncation, rounding). That leaves other weights "
        "than the actor's: not synced, quantised, or of another model; or several causes at once."
    )


def paths(rows: SequenceBatch, log_probs: Array) -> dict[tuple[int, ...], float]:
    """Each response token with all that is before it -> its log-prob [T]."""
    sequences = [tuple(sequence.tolist()) for sequence in rows.sequences]
    owners = rows.per_token(np.arange(len(rows))).tolist()
    places = zip(owners, (rows.predictors + 2).tolist(), log_probs.tolist(), strict=True)
    return {sequences[owner][:end]: value for owner, end, value in places}


def _are_those_of(
    rows: SequenceBatch, said: Array, before: Mapping[tuple[int, ...], float], hold: Callable[[Array], bool]
) -> bool:
    """Whether the engine says what the actor once did, of the tokens it was asked of then: some always are sampled
    again."""
    again = [value - before[path] for path, value in paths(rows, said).items() if path in before]
    return bool(again) and hold(np.abs(np.array(again)))


def _fitted_temperature(
    rows: SequenceBatch, said: Array, actors: Array, score: Score, temperature: float
) -> float | None:
    """The temperature at which the actor says the same, if there is one: by golden section on its logarithm."""

    def gap(log_ratio: float) -> float:
        return float(np.abs(said - score(rows, temperature * math.exp(log_ratio))).mean())

    shrink = (math.sqrt(5) - 1) / 2
    low, high = -math.log(WIDEST), math.log(WIDEST)
    a, b = high - shrink * (high - low), low + shrink * (high - low)
    gap_a, gap_b = gap(a), gap(b)
    for _ in range(TRIALS):
        if gap_a < gap_b:
            high, b, gap_b = b, a, gap_a
            a = high - shrink * (high - low)
            gap_a = gap(a)
        else:
            low, a, gap_a = a, b, gap_b
            b = low + shrink * (high - low)
            gap_b = gap(b)
    best, left = (a, gap_a) if gap_a < gap_b else (b, gap_b)
    return temperature * math.exp(best) if left < FITS * np.abs(said - actors).mean() else None
