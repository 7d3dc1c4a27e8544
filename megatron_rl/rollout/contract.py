"""The log-prob contract: an engine's log-probs of the tokens that it sampled are those of the actor.

Losses compare an engine's log-probs with the actor's. An engine can report slightly wrong log-probs for many reasons,
and training then goes wrong without an error. Every engine therefore samples a few responses to real prompts, the actor
scores them, and training stops if the log-probs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.config.rollout import RolloutSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.contract_causes import Score, likely_cause, mean_of_rounding, paths
from megatron_rl.types import Prompt, Response, SamplingParams

PROMPTS, RESPONSES, TOKENS = 8, 2, 64
"""Size of a probe: number of prompts, responses per prompt, and maximum number of tokens per response."""
BOUNDS = {"float32": (1e-4, 1e-4)}
"""Data type of the actor -> largest difference of a token and mean difference that are allowed, in nats."""
LARGEST_OF_HALF = 1.0
"""Largest difference of a token in half precision, whose mean difference is bounded by `mean_of_rounding`."""


class ProbedEngine(Protocol):
    """One engine, as the contract sees it."""

    number: int
    """Number of the engine in messages."""
    agrees: bool
    """Whether the engine was found to keep the contract. A replaced engine starts with False."""


Engine = TypeVar("Engine", bound=ProbedEngine)


class Probed(Protocol[Engine]):
    """The engines of a run."""

    @property
    def running(self) -> Sequence[Engine]:
        """Engines that have started."""
        ...

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> Mapping[Engine, Sequence[Sequence[Response]]]:
        """Returns each serving engine's responses to the prompts; engines that are lost meanwhile are left out."""
        ...


QUANTISED = 4.0
"""Factor on both bounds for engines that hold their weights in fewer bits than the actor. SmolLM2-135M in simulated FP8
differs from itself in bfloat16 by 0.10 nats in the mean per nat of surprisal, and by 3.1 for one token of 1,000
(`benchmarks/fp8_rollouts.py`)."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest differences between engine and actor that are allowed, in nats."""

    largest: float
    mean: float

    @classmethod
    def of(cls, settings: RolloutSettings, dtype: str, actors: Array) -> Bounds:
        """Returns the bounds for tokens of which the actor's log-probs are `actors` [T]."""
        quantised, given = settings.server.quantised, settings.contract
        exact = None if quantised else BOUNDS.get(dtype)
        largest, mean = exact or (LARGEST_OF_HALF, mean_of_rounding(actors))
        factor = QUANTISED if quantised else 1.0
        return cls(given.max_difference or factor * largest, given.mean_difference or factor * mean)

    def hold(self, gap: Array) -> bool:
        """Returns whether the absolute differences [T] are within the bounds. NaN is not."""
        return bool(gap.max() <= self.largest and gap.mean() <= self.mean)


class Contract:
    """Checks the contract. `check` is called after every weight sync and probes the engines only when it is due."""

    def __init__(
        self,
        settings: RolloutSettings,
        dtype: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        notify: Callable[[str], None],
    ) -> None:
        """`dtype`: the actor's data type. `notify`: receives a message when the engines are found to agree."""
        self._settings, self._dtype, self._notify = settings, dtype, notify
        self._prompts = list(prompts[:PROMPTS])
        self._sampling = replace(sampling, n=RESPONSES, max_tokens=min(TOKENS, sampling.max_tokens))
        self._syncs = 0
        self._before: dict[tuple[int, ...], float] = {}
        """The actor's log-probs at the last check: `paths` of the probed sequences."""

    def check(self, engines: Probed[Engine], score: Score) -> dict[str, float]:
        """Probes the engines if that is due, and returns metrics; none if it is not due.

        A check is due after the first sync, after the first update, after every `every` syncs, and if an engine was
        replaced. `score`: log-probs of the actor.

        Raises:
            UserError: an engine does not agree with the actor. The message names the likely cause.
        """
        self._syncs += 1
        every = self._settings.contract.every
        due = self._syncs <= 2 or (every > 0 and self._syncs % every == 0)
        if not due and all(engine.agrees for engine in engines.running):
            return {}
        gaps = []
        found: dict[tuple[int, ...], float] = {}
        for engine, groups in engines.probe(self._prompts, self._sampling).items():
            batch = self._batch(groups)
            actors = score(batch, self._sampling.temperature)
            gap = np.abs(batch.values["rollout_log_probs"] - actors)
            if not len(gap):
                raise UserError(
                    f"engine {engine.number} sampled no token in response to {len(self._prompts)} prompts, so its "
                    "log-probs cannot be compared with the actor's (rollout.contract)"
                )
            if not (bounds := Bounds.of(self._settings, self._dtype, actors)).hold(gap):
                raise UserError(self._refusal(engine.number, batch, actors, score, bounds))
            engine.agrees = True
            gaps.append(gap)
            found |= paths(batch, actors)
        if not gaps:
            return {}  # all engines were lost meanwhile: their replacements are checked
        self._before = found
        gap = np.concatenate(gaps)
        self._notify(
            f"log-probs of {len(gaps)} engine{'s' * (len(gaps) > 1)} and of the actor agree: the largest difference "
            f"over {len(gap)} tokens is {gap.max():.1e}, the mean {gap.mean():.1e}"
        )
        return {"logprob/contract_max_diff": float(gap.max()), "logprob/contract_abs_diff": float(gap.mean())}

    def _batch(self, groups: Sequence[Sequence[Response]]) -> SequenceBatch:
        """Returns the batch of one engine's responses to the prompts."""
        pairs = zip(self._prompts, groups, strict=True)
        return sequences_of((prompt.token_ids, response) for prompt, group in pairs for response in group)

    def _refusal(self, engine: int, batch: SequenceBatch, actors: Array, score: Score, bounds: Bounds) -> str:
        gap = np.abs(batch.values["rollout_log_probs"] - actors)
        cause = likely_cause(
            batch, actors, score, temperature=self._sampling.temperature, hold=bounds.hold, before=self._before
        )
        return (
            f"engine {engine} and the actor disagree: the log-probs of its {len(gap)} sampled tokens differ by "
            f"{gap.max():.2g} at most and by {gap.mean():.2g} on average; {bounds.largest:g} and "
            f"{bounds.mean:.2g} are allowed (rollout.contract). Training on these tokens would go wrong.\n"
            f"Likely cause: {cause}"
        )
