"""The likely cause if an engine's log-probs differ from the actor's: each known cause shows in its own way.

Legend: T tokens that an engine sampled; `engines` [T], the engine's log-probs of them; `actors` [T], the actor's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch
from megatron_rl.rollout.engines.kind import server_kinds

Score = Callable[[SequenceBatch, float], Array]
"""(batch, temperature) -> [T], log-probs of the sampled tokens under the actor's present weights."""

WIDEST = 4.0
"""Temperatures are tried from a fourth of the configured one to four times as much."""
TRIALS = 24
"""Number of temperatures that are tried."""
FITS = 0.05
"""A temperature explains a difference if less than this share of the difference is left at that temperature."""
AS_IF_ROUNDED = 0.03
"""Mean difference that half precision can cause, in nats per nat of the tokens' mean surprisal. SmolLM2-135M in
bfloat16 differs from itself in float32 by 0.02 to 0.035 nats in the mean, on text with 1.7 nats per token."""
ONE_SIDED = 0.1
"""Truncation raises every log-prob: of the differences, less than this share lowers one. Rounding lowers as many."""


def likely_cause(
    rows: SequenceBatch,
    actors: Array,
    score: Score,
    *,
    temperature: float,
    hold: Callable[[Array], bool],
    before: Mapping[tuple[int, ...], float],
) -> str:
    """Returns a sentence that names the cause and the remedy.

    Args:
        rows: The engine's sequences, with its log-probs as `rollout_log_probs`.
        actors: [T], the actor's log-probs.
        score: Log-probs of the actor at any temperature.
        temperature: Temperature of sampling.
        hold: Whether absolute differences [T] are small enough.
        before: `paths` of the actor's log-probs when the engines last agreed.
    """
    engines = rows.values["rollout_log_probs"].astype(np.float64)
    if not np.isfinite(engines).all():
        return "some of the engine's log-probs are NaN or infinite. The engine's log may show why."
    if _are_those_of(rows, engines, before, hold):
        return (
            "weights not synced: the engine has the weights that the actor had before the last updates. Do other "
            "processes load weights into this server, or does the server ignore new ones? The engine's log may show "
            "why; weight_sync.transport=disk is another way to send weights."
        )
    if temperature != 1 and hold(np.abs(engines - score(rows, 1.0))):
        remedies = ", or ".join(kind.processed_log_probs for kind in server_kinds())
        return (
            f"raw instead of processed log-probs: they are those at temperature 1, not at {temperature:g} "
            f"(rollout.temperature). Remedy: {remedies}. Check rollout.server.arguments and "
            "rollout.server.environment, or how the attached server was started."
        )
    if fitted := _fitted_temperature(rows, engines, actors, score, temperature):
        return (
            f"wrong temperature: they are those at {fitted:.3g}, not at {temperature:g} (rollout.temperature). Does an "
            "argument of the server, or something between this run and the server, set another temperature?"
        )
    higher = engines - actors
    lower = np.maximum(-higher, 0.0)
    if lower.mean() < ONE_SIDED * np.abs(higher).mean() and hold(lower):
        return (
            f"truncated sampling (top-p, top-k or min-p): no log-prob is lower than the actor's, as if "
            f"{1 - math.exp(-higher.mean()):.1%} of the distribution had been cut off and the rest scaled up. Such "
            "settings come from an argument of the server or from a generation_config.json that the server reads."
        )
    if np.abs(higher).mean() < mean_of_rounding(actors):
        return (
            "another precision: the differences are as small as those of rounding. Look for --dtype, --quantization or "
            "--kv-cache-dtype in rollout.server.arguments. If the precision is intended, raise "
            "rollout.contract.max_difference and mean_difference."
        )
    return (
        "none of the known ones alone (raw log-probs, temperature, truncation, rounding). Perhaps the engine has other "
        "weights than the actor: not synced, quantised, or of another model; or the server decodes speculatively and "
        "reports other log-probs for it; or several causes act at once."
    )


def mean_of_rounding(actors: Array) -> float:
    """Returns the mean difference in nats that half precision can cause on tokens whose log-probs are `actors` [T].

    Rounding differs between kernels, most on rare tokens. A mean surprisal below one nat counts as one.
    """
    return AS_IF_ROUNDED * max(1.0, -float(np.mean(actors)))


def paths(rows: SequenceBatch, log_probs: Array) -> dict[tuple[int, ...], float]:
    """Returns the log-prob of each sampled token, by the token ids of its sequence up to and including the token."""
    sequences = [tuple(sequence.tolist()) for sequence in rows.sequences]
    owners = rows.per_token(np.arange(len(rows))).tolist()
    places = zip(owners, (rows.predictors + 2).tolist(), log_probs.tolist(), strict=True)
    return {sequences[owner][:end]: value for owner, end, value in places}


def _are_those_of(
    rows: SequenceBatch, engines: Array, before: Mapping[tuple[int, ...], float], hold: Callable[[Array], bool]
) -> bool:
    """Returns whether the engine's log-probs are those that the actor had before, on tokens that were sampled again.

    Some tokens of a probe always are.
    """
    again = [value - before[path] for path, value in paths(rows, engines).items() if path in before]
    return bool(again) and hold(np.abs(np.array(again)))


def _fitted_temperature(
    rows: SequenceBatch, engines: Array, actors: Array, score: Score, temperature: float
) -> float | None:
    """Returns the temperature at which the actor's log-probs are those of the engine, None if there is none.

    Found by golden-section search on the logarithm of the temperature.
    """

    def gap(log_ratio: float) -> float:
        return float(np.abs(engines - score(rows, temperature * math.exp(log_ratio))).mean())

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
    return temperature * math.exp(best) if left < FITS * np.abs(engines - actors).mean() else None
