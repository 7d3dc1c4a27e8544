"""The log-prob contract: what an engine says of the tokens it sampled is what the actor says of them.

Losses compare an engine's log-probs with the actor's. Engines have many ways to get them subtly wrong, and training
then goes astray without an error. So every engine samples a few responses to real prompts, the actor scores them, and
training does not go on where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_rl.batching.arrays import Array
from megatron_rl.batching.sequences import SequenceBatch, sequences_of
from megatron_rl.config.rollout import ContractSettings
from megatron_rl.errors import UserError
from megatron_rl.rollout.contract_causes import Score, likely_cause, paths
from megatron_rl.types import Prompt, Response, SamplingParams

if TYPE_CHECKING:
    from megatron_rl.cluster.engine_process import EngineProcess

PROMPTS, RESPONSES, TOKENS = 8, 2, 64
"""Of a probe: responses to each prompt, and the longest of them."""
BOUNDS = {"float32": (1e-4, 1e-4)}
"""Largest difference of a token, mean difference, in nats."""
BOUNDS_OF_HALF = (1.0, 0.03)
"""The same in bfloat16: rounding differs with every kernel, most on rare tokens, but hardly in the mean."""


class Probed(Protocol):
    """The engines of a run."""

    @property
    def running(self) -> list[EngineProcess]: ...

    def probe(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> dict[EngineProcess, list[list[Response]]]: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a difference may be, in nats."""

    largest: float
    mean: float

    @classmethod
    def of(cls, settings: ContractSettings, dtype: str) -> Bounds:
        largest, mean = BOUNDS.get(dtype, BOUNDS_OF_HALF)
        return cls(settings.max_difference or largest, settings.mean_difference or mean)

    def hold(self, gap: Array) -> bool:
        """gap [T], absolute. One that is no number does not."""
        return bool(gap.max() <= self.largest and gap.mean() <= self.mean)


class Contract:
    """Call `check` after every weight sync; it looks when there is reason to."""

    def __init__(
        self,
        settings: ContractSettings,
        dtype: str,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        notify: Callable[[str], None],
    ) -> None:
        """dtype: of the actor. say: told when engines are found to agree."""
        self.bounds, self._every, self._say = Bounds.of(settings, dtype), settings.every, notify
        self._prompts = list(prompts[:PROMPTS])
        self._sampling = replace(sampling, n=RESPONSES, max_tokens=min(TOKENS, sampling.max_tokens))
        self._syncs = 0
        self._before: dict[tuple[int, ...], float] = {}
        """What the actor said at the last check."""

    def check(self, engines: Probed, score: Score) -> dict[str, float]:
        """Metrics, where it was time to look: after the first sync, after the first update, every so many, and when an
        engine was replaced. score: the actor's.

        Raises UserError, with the likely cause, when an engine does not agree.
        """
        self._syncs += 1
        due = self._syncs <= 2 or (self._every > 0 and self._syncs % self._every == 0)
        if not due and all(engine.agrees for engine in engines.running):
            return {}
        gaps = []
        said: dict[tuple[int, ...], float] = {}
        for engine, groups in engines.probe(self._prompts, self._sampling).items():
            rows = self._rows(groups)
            actors = score(rows, self._sampling.temperature)
            gap = np.abs(rows.values["rollout_log_probs"] - actors)
            if not self.bounds.hold(gap):
                raise UserError(self._refusal(engine.number, rows, actors, score))
            engine.agrees = True
            gaps.append(gap)
            said |= paths(rows, actors)
        if not gaps:
            return {}  # all of them were lost meanwhile: they are looked at when others have taken their place
        self._before = said
        gap = np.concatenate(gaps)
        self._say(
            f"log-probs of {len(gaps)} engine{'s' * (len(gaps) > 1)} and of the actor agree: of {len(gap)} tokens "
            f"none differs by more than {gap.max():.1e}, the mean by {gap.mean():.1e}"
        )
        return {"logprob/contract_max_diff": float(gap.max()), "logprob/contract_abs_diff": float(gap.mean())}

    def _rows(self, groups: Sequence[Sequence[Response]]) -> SequenceBatch:
        """Of one engine's answer."""
        pairs = zip(self._prompts, groups, strict=True)
        return sequences_of((prompt.token_ids, response) for prompt, group in pairs for response in group)

    def _refusal(self, engine: int, rows: SequenceBatch, actors: Array, score: Score) -> str:
        gap = np.abs(rows.values["rollout_log_probs"] - actors)
        cause = likely_cause(
            rows, actors, score, temperature=self._sampling.temperature, hold=self.bounds.hold, before=self._before
        )
        return (
            f"engine {engine} and the actor disagree: log-probs of the {len(gap)} tokens it sampled differ by "
            f"{gap.max():.2g} at most and {gap.mean():.2g} in the mean; {self.bounds.largest:g} and "
            f"{self.bounds.mean:g} are allowed (rollout.contract). Training on them would go astray.\n"
            f"Likely cause: {cause}"
        )
