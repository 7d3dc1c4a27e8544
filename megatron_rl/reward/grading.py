"""Rewards of a step's responses: the verifier's scores, their failures, and the reward's shaping by form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_rl.config.reward import RewardSettings
from megatron_rl.reward.grader import Grader
from megatron_rl.reward.outcomes import check_failures, outcome_rates
from megatron_rl.reward.shaping import format_penalties
from megatron_rl.types import AgentResponse, Prompt, Response, RewardResult, Sample


class Grading:
    """Grades responses with a run's verifier."""

    def __init__(self, grader: Grader, settings: RewardSettings) -> None:
        self.grader, self.settings = grader, settings

    def grade(self, pairs: Sequence[tuple[Prompt, Response]]) -> list[RewardResult]:
        """One result per response, in order, with the response's text: the verdict of its agent, or of the verifier. A
        response whose generation failed has the outcome "error", whatever the verdict."""
        return self.grade_samples([Sample(*pair, text="") for pair in pairs])

    def grade_samples(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """As `grade`, for samples that may have their text already."""
        responses = [sample.response for sample in samples]
        own = [response.reward if isinstance(response, AgentResponse) else None for response in responses]
        rest = [sample for sample, reward in zip(samples, own, strict=True) if reward is None]
        graded = iter(self.grader.score(rest))
        results = [next(graded) if reward is None else reward for reward in own]
        failed = [reward is not None and not reward.has_score for reward in own]
        faults = (
            "" if known else generation_fault(response) for known, response in zip(failed, responses, strict=True)
        )
        return [
            replace(result, score=0.0, detail=fault, outcome="error") if fault else result
            for result, fault in zip(results, faults, strict=True)
        ]

    def check(self, graded: Sequence[tuple[Prompt, RewardResult]]) -> dict[str, float]:
        """Returns metrics of how grading went. Raises UserError if too many responses could not be graded."""
        check_failures(graded, self.settings)
        results = [result for _, result in graded]
        rates = outcome_rates(results)
        if self.settings.format:
            penalties = self._penalties(results)
            rates["reward/format_fraction"] = penalties.count(0.0) / max(len(results), 1)
        return rates

    def shaped(self, results: Sequence[RewardResult]) -> list[float]:
        """Rewards of results that have a score: the scores, lowered for responses of the wrong form."""
        return [result.score + penalty for result, penalty in zip(results, self._penalties(results), strict=True)]

    def _penalties(self, results: Sequence[RewardResult]) -> list[float]:
        return format_penalties([result.text for result in results], self.settings.format)


def generation_fault(response: Response) -> str:
    """Returns why the engine did not generate this response properly, or an empty text."""
    if not response.num_sampled_tokens:
        return "the generation failed: the response has no sampled token"
    for sequence in response.sequences:
        if len(sequence.log_probs) and np.isnan(log_probs := sequence.sampled(sequence.log_probs)).any():
            token = int(sequence.sampled(sequence.token_ids)[np.isnan(log_probs).argmax()])
            return f"the generation failed: the engine's log-prob of token {token} is not a number"
    return ""
